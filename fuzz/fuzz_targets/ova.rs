#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| imgtool_fuzz::targets::run("ova", input));
libfuzzer_sys::fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    imgtool_fuzz::mutate::mutate(&mut data[..max_size], size, seed, &mut libfuzzer_sys::fuzzer_mutate)
});
