//! Reads qcow2 images with qcow2-rs and compares them with a raw file: `imgtool-oracle-qcow2-rs RAW IMAGE...`.
//! Prints the path of every image that has the same content. Panics at the first that does not.

use std::path::PathBuf;

use futures::executor::block_on;
use qcow2_rs::dev::Qcow2DevParams;
use qcow2_rs::helpers::Qcow2IoBuf;
use qcow2_rs::utils::qcow2_setup_dev_sync;

fn main() {
    let mut paths = std::env::args_os().skip(1).map(PathBuf::from);
    let expected = std::fs::read(paths.next().expect("the path of a raw file")).expect("read the raw file");
    for path in paths {
        let params = Qcow2DevParams::new(9, None, None, true, false);
        let device = qcow2_setup_dev_sync(&path, &params).expect("open the image");
        assert_eq!(device.info.virtual_size(), expected.len() as u64, "{}", path.display());
        let mut theirs = Qcow2IoBuf::<u8>::new(expected.len());
        block_on(async {
            device.qcow2_prep_io().await.expect("prepare the image");
            let read = device.read_at(&mut theirs, 0).await.expect("read the image");
            assert_eq!(read, expected.len(), "{}", path.display());
        });
        assert_eq!(theirs.iter().zip(&expected).position(|(a, b)| a != b), None, "{}", path.display());
        println!("{}", path.display());
    }
}
