//! Refusal of system calls that no conversion needs, by a seccomp filter.

use crate::sandbox::Network;

/// Installs the filters for this thread and its later threads. The calls then fail with EPERM. With
/// `network`, those remain that connect to servers.
///
/// # Errors
/// `None` if the kernel or this processor has no filters.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64", target_arch = "riscv64"))]
pub(super) fn refuse(network: Network) -> Option<()> {
    programs(network)?.iter().try_for_each(|program| seccompiler::apply_filter(program).ok())
}

/// Returns the programs of the filters. The kernel runs all of them for each call.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64", target_arch = "riscv64"))]
fn programs(network: Network) -> Option<Vec<seccompiler::BpfProgram>> {
    use seccompiler::{SeccompAction, SeccompFilter};

    let architecture = std::env::consts::ARCH.try_into().ok()?;
    let refused = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let connects = network != Network::default();
    let refused_calls = REFUSED.iter().filter(|call| !connects || !TO_CONNECT.contains(*call));
    let rules = refused_calls.map(|call| (*call, Vec::new())).chain([(libc::SYS_ioctl, typing()?)]);
    let sockets = if connects { Some((libc::SYS_socket, other_sockets(network)?)) } else { None };
    let rules = rules.chain(sockets);
    let filter = SeccompFilter::new(rules.collect(), SeccompAction::Allow, refused, architecture).ok()?;
    let mut programs = vec![filter.try_into().ok()?];
    if cfg!(target_arch = "x86_64") {
        programs.push(x32());
    }
    Some(programs)
}

/// Returns the rules for the requests of ioctl(2) that type into a terminal. A shell would run the typed line
/// after the program has ended. Linux before 6.2 allows TIOCSTI to every user.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64", target_arch = "riscv64"))]
fn typing() -> Option<Vec<seccompiler::SeccompRule>> {
    use seccompiler::{SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, SeccompCondition, SeccompRule};

    // The type differs between C libraries. The kernel uses the lower 32 bits of the request.
    #[allow(clippy::unnecessary_cast)]
    let requests = [libc::TIOCSTI as u64, libc::TIOCLINUX as u64];
    let rule = |request| SeccompRule::new(vec![SeccompCondition::new(1, Dword, Eq, request).ok()?]).ok();
    requests.into_iter().map(rule).collect()
}

/// System calls that connect to servers. The resolver of musl also binds its socket. Accepting a connection
/// takes listen(2), which is refused.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64", target_arch = "riscv64"))]
const TO_CONNECT: &[i64] = match cfg!(target_env = "musl") {
    true => &[libc::SYS_socket, libc::SYS_connect, libc::SYS_bind],
    false => &[libc::SYS_socket, libc::SYS_connect],
};

/// Returns the rules for sockets of other kinds than `network` permits.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64", target_arch = "riscv64"))]
fn other_sockets(network: Network) -> Option<Vec<seccompiler::SeccompRule>> {
    use seccompiler::{SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, SeccompCondition, SeccompRule};

    let internet = [libc::AF_INET, libc::AF_INET6].into_iter().filter(|_| network.internet);
    let families = internet.chain([libc::AF_UNIX].into_iter().filter(|_| network.local));
    let other = |family: i32| SeccompCondition::new(0, Dword, Ne, u64::from(family.unsigned_abs())).ok();
    Some(vec![SeccompRule::new(families.map(other).collect::<Option<_>>()?).ok()?])
}

/// Returns a program that refuses the system calls of x32, an interface of some kernels to programs with
/// pointers of 32 bits. Its calls have numbers of their own and the same architecture code.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64", target_arch = "riscv64"))]
fn x32() -> seccompiler::BpfProgram {
    use libc::{BPF_ABS, BPF_JMP, BPF_JSET, BPF_K, BPF_LD, BPF_RET, BPF_W};

    /// Bit that is set in the number of each call (__X32_SYSCALL_BIT of the kernel).
    const X32_BIT: u32 = 0x4000_0000;
    // The codes have 16 bits; the constants of the C library have 32.
    let step = |code: u32, jf, k| seccompiler::sock_filter { code: code as u16, jt: 0, jf, k };
    vec![
        // The number of the call is the first field of the data (seccomp(2)).
        step(BPF_LD | BPF_W | BPF_ABS, 0, 0),
        step(BPF_JMP | BPF_JSET | BPF_K, 1, X32_BIT),
        step(BPF_RET | BPF_K, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM.unsigned_abs()),
        step(BPF_RET | BPF_K, 0, libc::SECCOMP_RET_ALLOW),
    ]
}

/// Numbers of the refused system calls. A list of the calls that *are* needed would depend on the version of
/// the C library.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64", target_arch = "riscv64"))]
const REFUSED: [i64; 44] = [
    // Other programs and processes.
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_getfd,
    // The network. Pairs of sockets stay: the signal handler uses one.
    libc::SYS_socket,
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_listen,
    libc::SYS_accept,
    libc::SYS_accept4,
    // File systems and namespaces.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_fsopen,
    libc::SYS_fspick,
    libc::SYS_fsmount,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_mount_setattr,
    libc::SYS_open_by_handle_at,
    libc::SYS_quotactl,
    // The machine.
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    // Large parts of the kernel that had many flaws.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
];

/// Returns `None`: no filters for this processor.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64", target_arch = "riscv64")))]
pub(super) fn refuse(_network: Network) -> Option<()> {
    None
}

#[cfg(all(test, any(target_arch = "x86_64", target_arch = "aarch64", target_arch = "riscv64")))]
mod tests {
    use std::fmt::Write as _;
    use std::process::Command;

    use imgtool_testing::require;

    use super::*;

    /// Installs the filters given in hexadecimal and makes calls. Prints the number of the error of each.
    const CALLS: &str = r#"
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
class Program(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
null = open("/dev/null")
for text in sys.argv[1:]:
    code = bytes.fromhex(text)
    steps = ctypes.create_string_buffer(code, len(code))
    program = Program(len(code) // 8, ctypes.cast(steps, ctypes.c_void_p))
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, 2, ctypes.byref(program)) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
def ioctl(request):
    return libc.ioctl(null.fileno(), ctypes.c_ulong(request), ctypes.byref(ctypes.c_char(0)))
def x32(number):
    return libc.syscall(ctypes.c_long(0x40000000 | number), 0, 0, 0, 0, 0)
calls = [lambda request=request: ioctl(request) for request in (0x5412, 0x541c, 0x5413, 0xabcd00005412)]
calls += [lambda number=number: x32(number) for number in (520, 545, 521, 514, 41)]
for call in calls:
    ctypes.set_errno(0)
    call()
    print(ctypes.get_errno(), end=" ")
"#;

    /// Returns the instructions as the kernel takes them.
    fn hex(program: &seccompiler::BpfProgram) -> String {
        program.iter().fold(String::new(), |mut text, step| {
            let bytes = [&step.code.to_ne_bytes()[..], &[step.jt, step.jf], &step.k.to_ne_bytes()].concat();
            bytes.iter().for_each(|byte| write!(text, "{byte:02x}").expect("a string"));
            text
        })
    }

    /// Returns the errors of the calls under `programs`.
    fn errors(programs: &[seccompiler::BpfProgram]) -> Vec<i32> {
        let python = Command::new("python3").args(["-c", CALLS]).args(programs.iter().map(hex)).output();
        let output = python.expect("python3 starts");
        assert!(output.status.success(), "{output:?}");
        let numbers = String::from_utf8(output.stdout).expect("numbers");
        numbers.split_whitespace().map(|number| number.parse().expect("a number")).collect()
    }

    /// Code in a decoder can't have the shell run a line after the program. /dev/null is no terminal, so the
    /// kernel answers ENOTTY without the filter.
    #[test]
    fn types_into_no_terminal() {
        require!("python3");
        let refused = [libc::EPERM, libc::EPERM, libc::ENOTTY, libc::EPERM];
        assert_eq!(errors(&programs(Network::default()).expect("filters"))[..4], refused);
        assert_eq!(errors(&[])[..4], [libc::ENOTTY; 4]);
    }

    /// The numbers are those of execve, execveat, ptrace, ioctl and socket.
    #[test]
    #[cfg(target_arch = "x86_64")]
    fn makes_no_call_of_x32() {
        require!("python3");
        assert_eq!(errors(&programs(Network::default()).expect("filters"))[4..], [libc::EPERM; 5]);
        assert!(!errors(&[])[4..].contains(&libc::EPERM));
    }
}
