//! Confinement on Linux: Landlock for files and TCP, seccomp for system calls.

use std::path::{Path, PathBuf};

use imgtool_engine::Reach;
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, RestrictSelfAttr,
    Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, Scope, make_bitflags,
    path_beneath_rules,
};

use super::Network;

mod system_calls;

/// Newest version of Landlock whose rights are requested. The kernel ignores those that it does not know.
/// Versions above 7 are untested; they deny what imgtool does not use.
const NEWEST: ABI = ABI::V10;

/// Rights at a directory in which outputs and directories for them may be created, written, read back,
/// renamed and removed.
fn to_create() -> BitFlags<AccessFs> {
    make_bitflags!(AccessFs::{
        ReadFile | ReadDir | WriteFile | Truncate | MakeReg | RemoveFile | Refer | MakeDir | RemoveDir
    })
}

/// Rights at the directory of open outputs: name them, and remove their old names. Without `Refer`, nothing
/// moves to another directory below it. A new file can't be opened, so it stays empty.
fn to_name() -> BitFlags<AccessFs> {
    make_bitflags!(AccessFs::{MakeReg | RemoveFile})
}

/// Rights at the directory of open outputs in which an empty file reserves a name.
fn to_reserve() -> BitFlags<AccessFs> {
    to_name() | make_bitflags!(AccessFs::{ReadFile | WriteFile})
}

/// Rights at the parent of a new directory: flush it, and remove the new directory after a failure.
fn to_remove() -> BitFlags<AccessFs> {
    make_bitflags!(AccessFs::{ReadDir | RemoveDir})
}

/// Rights of a file that is only read.
fn to_read() -> BitFlags<AccessFs> {
    make_bitflags!(AccessFs::{ReadFile | ReadDir})
}

/// Refuses system calls, network and, with `writable`, writes elsewhere. With `network`, connections to
/// servers remain. Where a step fails, the process goes on without it: the kernel may be too old, or too many
/// files open.
pub(super) fn enter(writable: Option<&[PathBuf]>, network: Network) {
    let _ = system_calls::refuse(network);
    let _ = restrict_writes(writable, network);
}

fn restrict_writes(writable: Option<&[PathBuf]>, network: Network) -> Option<()> {
    // Names are looked up over UDP.
    let closed =
        if network.internet { BitFlags::from(AccessNet::BindTcp) } else { AccessNet::from_all(NEWEST) };
    let mut handled = BitFlags::from(AccessFs::Execute);
    if writable.is_some() {
        // Sources may be devices, which are not known yet, so ioctl(2) stays allowed.
        handled |= AccessFs::from_write(NEWEST) & !BitFlags::from(AccessFs::IoctlDev);
    }
    if network.local {
        handled &= !BitFlags::from(AccessFs::ResolveUnix);
    }
    let mut rules = Ruleset::default()
        .handle_access(handled)
        .and_then(|rules| rules.handle_access(closed))
        .and_then(|rules| rules.scope(Scope::from_all(NEWEST)))
        .and_then(Ruleset::create)
        .ok()?;
    for path in writable.unwrap_or_default() {
        allow(&mut rules, path, to_create() & handled)?;
    }
    rules.restrict_self().ok().map(drop)
}

/// Closes all files but those within `reach`, and those that describe this system. Later threads inherit
/// this; since version 8 of Landlock, existing threads get it too. Returns true if the kernel does so.
pub(super) fn narrow(reach: &Reach) -> bool {
    restrict_files(reach, true).is_some()
}

fn restrict_files(reach: &Reach, all_threads: bool) -> Option<()> {
    let mut rules =
        Ruleset::default().handle_access(AccessFs::from_all(NEWEST)).and_then(Ruleset::create).ok()?;
    let directories =
        [(&reach.files, to_name()), (&reach.reserved, to_reserve()), (&reach.parents, to_remove())];
    for (directories, access) in directories {
        for directory in directories {
            (&mut rules).add_rule(PathBeneath::new(directory, access)).ok()?;
        }
    }
    for path in &reach.reads {
        allow(&mut rules, path, to_read())?;
    }
    // The number of processors that may be used, and the layers of block devices.
    for path in ["/proc", "/sys"] {
        allow(&mut rules, Path::new(path), to_read())?;
    }
    rules.all_threads(all_threads).and_then(RulesetCreated::restrict_self).ok().map(drop)
}

/// Allows `access` at and below `path`.
///
/// # Errors
/// `None` if the path exists and can't be opened, for example because too many files are open. A confined
/// process would then lack the path.
fn allow(rules: &mut RulesetCreated, path: &Path, access: BitFlags<AccessFs>) -> Option<()> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    match path_beneath_rules([path], access).next() {
        Some(rule) => {
            // Fails for what takes no rules and needs none, such as a pipe.
            let _ = rules.add_rule(rule.ok()?);
            Some(())
        }
        None => (!path.exists()).then_some(()),
    }
}

/// Returns what the kernel enforces. Confines the calling thread with the filter of system calls, since the
/// kernel tells only then.
pub(super) fn enforced() -> Vec<&'static str> {
    let can = |ruleset: Result<Ruleset, RulesetError>| ruleset.and_then(Ruleset::create).is_ok();
    let strict = || Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
    let mut parts = Vec::new();
    if can(strict().handle_access(AccessFs::from_all(ABI::V1))) {
        parts.push("files (Landlock)");
    }
    if can(strict().handle_access(AccessNet::from_all(ABI::V4))) {
        parts.push("TCP (Landlock)");
    }
    if system_calls::refuse(Network::default()).is_some() {
        parts.push("programs and sockets (seccomp)");
    }
    parts
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::{ErrorKind, Write};
    use std::net::TcpListener;
    use std::process::Command;
    use std::sync::Arc;

    use imgtool_storage::os::DirectoryHandle;
    use imgtool_testing::oracles;

    use super::*;

    /// Runs `test` in a thread of its own: a thread can't be released again.
    fn confined(test: impl FnOnce() + Send + 'static) {
        std::thread::spawn(test).join().expect("the confined thread failed");
    }

    /// True if the kernel enforces what `name` says. Otherwise reports the test as skipped.
    fn can(name: &str) -> bool {
        let can = std::thread::spawn(enforced).join().expect("a thread").contains(&name);
        if !can {
            oracles::unable(&format!("the kernel does not enforce: {name}"), false);
        }
        can
    }

    fn denied<T>(result: std::io::Result<T>) -> bool {
        result.is_err_and(|e| e.kind() == ErrorKind::PermissionDenied)
    }

    #[test]
    fn writes_only_beneath_the_given_directories() {
        if !can("files (Landlock)") {
            return;
        }
        let (inside, outside) =
            (tempfile::tempdir().expect("a directory"), tempfile::tempdir().expect("one"));
        let (dir, other) = (inside.path().to_owned(), outside.path().to_owned());
        fs::write(other.join("source"), "x").expect("write");
        confined(move || {
            enter(Some(std::slice::from_ref(&dir)), Network::default());
            fs::create_dir(dir.join("new")).expect("create a directory");
            fs::write(dir.join("new/a"), "x").expect("write");
            fs::rename(dir.join("new/a"), dir.join("new/b")).expect("rename");
            fs::remove_file(dir.join("new/b")).expect("remove");
            assert_eq!(fs::read(other.join("source")).expect("read"), b"x");
            assert!(denied(fs::write(other.join("a"), "x")));
            assert!(denied(fs::remove_file(other.join("source"))));
            assert!(denied(fs::rename(other.join("source"), dir.join("source"))));
        });
    }

    #[test]
    fn opens_only_files_within_reach_when_narrowed() {
        if !can("files (Landlock)") {
            return;
        }
        let home = tempfile::tempdir().expect("a directory");
        let [files, reserved, parents, reads, other] = ["files", "reserved", "parents", "reads", "other"]
            .map(|name| {
                let path = home.path().join(name);
                for name in ["empty", "below"] {
                    fs::create_dir_all(path.join(name)).expect("create");
                }
                for name in ["old", "output", "below/old"] {
                    fs::write(path.join(name), "x").expect("write");
                }
                path
            });
        let handle = |path| vec![Arc::new(DirectoryHandle::open(path).expect("open"))];
        let reach = Reach {
            files: handle(&files),
            reserved: handle(&reserved),
            parents: handle(&parents),
            reads: [reads.clone()].into(),
        };
        let open = File::open(other.join("old")).expect("open");
        let mut output = File::options().write(true).open(files.join("output")).expect("open");
        confined(move || {
            restrict_files(&reach, false).expect("restrict");
            names_open_files_only(&files, &mut output);
            File::create_new(reserved.join("new")).expect("reserve");
            File::open(&parents).and_then(|directory| directory.sync_all()).expect("flush");
            fs::remove_dir(parents.join("empty")).expect("remove");
            assert!(denied(fs::read(parents.join("old"))));
            assert!(denied(fs::remove_file(parents.join("old"))));
            assert_eq!(fs::read(reads.join("old")).expect("read"), b"x");
            assert!(denied(fs::write(reads.join("old"), "y")));
            assert!(denied(fs::read(other.join("old"))));
            assert!(denied(fs::read_dir(&other)));
            // What is open already stays open.
            assert_eq!(std::io::read_to_string(&open).expect("read"), "x");
            fs::read("/proc/self/status").expect("describes this system");
        });
    }

    /// The directory of outputs may be the user's home: nothing in or below it can be read or written.
    fn names_open_files_only(files: &Path, output: &mut File) {
        for path in [files.join("old"), files.join("below/old")] {
            assert!(denied(fs::read(&path)));
            assert!(denied(File::options().append(true).open(&path)));
            assert!(denied(File::options().write(true).truncate(true).open(&path)));
        }
        assert!(denied(fs::read_dir(files)));
        assert!(denied(fs::write(files.join("new"), "x")));
        assert!(denied(fs::create_dir(files.join("another"))));
        // What naming and removing the outputs takes.
        output.write_all(b"y").expect("write");
        output.set_len(1).expect("truncate");
        assert!(fs::rename(files.join("output"), files.join("below/output")).is_err());
        fs::hard_link(files.join("output"), files.join("link")).expect("link");
        fs::rename(files.join("output"), files.join("named")).expect("rename");
        fs::rename(files.join("named"), files.join("old")).expect("replace");
        fs::remove_file(files.join("link")).expect("remove");
    }

    #[test]
    fn starts_no_program_and_opens_no_socket() {
        if !can("programs and sockets (seccomp)") {
            return;
        }
        confined(|| {
            Command::new("true").status().expect("a program that can be started");
            enter(None, Network::default());
            assert!(denied(Command::new("true").status()));
            assert!(denied(TcpListener::bind("127.0.0.1:0")));
            assert!(denied(std::os::unix::net::UnixDatagram::unbound()));
            // The signal handler needs a pair of sockets, and workers need threads.
            std::os::unix::net::UnixStream::pair().expect("a pair of sockets");
            std::thread::spawn(|| assert!(denied(TcpListener::bind("127.0.0.1:0"))))
                .join()
                .expect("a thread");
        });
    }

    #[test]
    fn connects_to_servers_alone_if_a_source_is_a_url() {
        if !can("programs and sockets (seccomp)") {
            return;
        }
        let server = TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = server.local_addr().expect("an address");
        confined(move || {
            enter(None, Network { internet: true, local: false });
            std::net::TcpStream::connect(address).expect("connect");
            // The resolver of musl binds the socket by which it looks up names.
            let bound = std::net::UdpSocket::bind("127.0.0.1:0");
            assert_eq!(bound.is_ok(), cfg!(target_env = "musl"));
            assert!(denied(TcpListener::bind("127.0.0.1:0")));
            assert!(denied(std::os::unix::net::UnixDatagram::unbound()));
            assert!(denied(std::os::unix::net::UnixStream::connect("/run/x")));
            assert!(denied(Command::new("true").status()));
        });
    }

    #[test]
    fn connects_to_local_services_alone_if_a_source_is_a_local_socket() {
        if !can("programs and sockets (seccomp)") {
            return;
        }
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("socket");
        let _service = std::os::unix::net::UnixListener::bind(&path).expect("bind");
        confined(move || {
            enter(Some(&[]), Network { internet: false, local: true });
            std::os::unix::net::UnixStream::connect(&path).expect("connect");
            assert!(denied(std::net::TcpStream::connect("127.0.0.1:1")));
            assert!(denied(std::net::UdpSocket::bind("127.0.0.1:0")));
            assert!(std::os::unix::net::UnixListener::bind(path.with_extension("new")).is_err());
        });
    }

    #[test]
    fn writes_anywhere_while_targets_are_unknown() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("a");
        confined(move || {
            enter(None, Network::default());
            fs::write(&path, "x").expect("write");
        });
    }
}
