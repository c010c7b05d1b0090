//! Compares the seeds, the findings and the first mutated images with other programs.

use std::fs;
use std::path::Path;

use imgtool_fuzz::fields::fuzz::{Case, Seeds, Tally, run};
use imgtool_fuzz::fields::{FORMATS, judge::Verdict};
use imgtool_testing::{require, tempdir};

/// Number of mutated images. Our limit: about 4 seconds.
const MUTATED: u64 = 150;

#[test]
fn seeds_and_findings_are_read_like_by_others() {
    require!("qemu-img");
    let directory = tempdir();
    let mut same = 0;
    for target in FORMATS {
        for kind in ["seeds", "findings"] {
            let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(kind).join(target);
            let entries = fs::read_dir(kept).into_iter().flatten();
            for path in entries.map(|entry| entry.expect("an entry").path()) {
                let case = Case { target, input: fs::read(&path).expect("readable") };
                let verdict = run(&case, directory.path()).expect("runs").expect("no panic");
                let is_fault = matches!(verdict, Some(Verdict::Differs(_) | Verdict::LeftBehind(_)));
                assert!(!is_fault, "{}: {verdict:?}", path.display());
                same += u32::from(verdict == Some(Verdict::Same));
            }
        }
    }
    assert!(same > 20, "only {same} are compared");
}

#[test]
fn mutated_images_keep_the_promises() {
    require!("qemu-img");
    let directory = tempdir();
    let seeds = Seeds::find().expect("seeds");
    let mut tally = Tally::default();
    for number in 0..MUTATED {
        tally.run(&seeds, number, directory.path()).expect("runs");
    }
    assert!(tally.failures.is_empty(), "{:#?}", tally.failures);
    let same = tally.verdicts.iter().filter(|(name, _)| name.ends_with(" Same"));
    assert!(same.map(|(_, (count, _))| count).sum::<u64>() > MUTATED / 10, "{:#?}", tally.verdicts);
}
