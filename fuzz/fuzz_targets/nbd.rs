#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| imgtool_fuzz::targets::run("nbd", input));
