//! Checks what the system allows a process: to lock memory, to open files, to use io_uring.

use std::path::Path;

use sluice_model::memory::Bytes;

use super::{Finding, read};

/// Open files that a server with some clients and a model in volumes needs.
const FILES: u64 = 512;
/// The capability that lifts the limit on locked memory (`CAP_IPC_LOCK`).
const IPC_LOCK: u32 = 14;

/// A limit of this process: its soft value, `u64::MAX` for none.
fn limit(root: &Path, name: &str) -> Option<u64> {
    let text = read(root, "proc/self/limits")?;
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    match rest.split_whitespace().next()? {
        "unlimited" => Some(u64::MAX),
        number => number.parse().ok(),
    }
}

/// Whether this process may lock memory without limit.
fn may_lock_all(root: &Path) -> bool {
    let effective = |text: String| {
        let digits = text.lines().find_map(|line| line.strip_prefix("CapEff:"))?.trim().to_owned();
        u64::from_str_radix(&digits, 16).ok()
    };
    read(root, "proc/self/status").and_then(effective).is_some_and(|set| (set >> IPC_LOCK) & 1 == 1)
}

/// Checks the limit on locked memory: io_uring reads faster into slots that are registered, and those count as locked. `available`:
/// bytes of memory that slots may take.
pub(crate) fn locked_memory(root: &Path, available: u64) -> Option<Finding> {
    let limit = limit(root, "Max locked memory")?;
    Some(match limit {
        u64::MAX => Finding::ok("locked memory", "no limit"),
        _ if may_lock_all(root) => Finding::ok("locked memory", "no limit for this account"),
        _ if limit >= available => Finding::ok("locked memory", Bytes(limit).to_string()),
        _ => Finding::better(
            "locked memory",
            format!(
                "{} may be locked, less than expert slots may take: no more of them is registered with io_uring",
                Bytes(limit)
            ),
            "`ulimit -l unlimited`; for good, `memlock unlimited` in /etc/security/limits.conf, `LimitMEMLOCK=infinity` of a systemd \
             unit, or `docker run --ulimit memlock=-1`",
        ),
    })
}

/// Checks how many files may be open at once.
pub(crate) fn open_files(root: &Path) -> Option<Finding> {
    let limit = limit(root, "Max open files")?;
    Some(match limit {
        u64::MAX => Finding::ok("open files", "no limit"),
        _ if limit < FILES => Finding::better(
            "open files",
            format!("{limit} at most, few for a server with many clients"),
            "`ulimit -n 4096`; for good, `nofile` in /etc/security/limits.conf",
        ),
        _ => Finding::ok("open files", format!("{limit} at most")),
    })
}

/// Checks io_uring. `tried`: a ring has been set up, or was refused for a reason.
pub(crate) fn io_uring(root: &Path, tried: &Result<(), String>) -> Finding {
    let Err(reason) = tried else { return Finding::ok("io_uring", "available") };
    let instead = "threads read instead, at the same bandwidth, and take more of the processor";
    let setting = read(root, "proc/sys/kernel/io_uring_disabled");
    match setting.as_deref() {
        Some("1" | "2") => Finding::better(
            "io_uring",
            format!("turned off by kernel.io_uring_disabled; {instead}"),
            "sudo sysctl kernel.io_uring_disabled=0",
        ),
        Some("0") => Finding::better(
            "io_uring",
            format!("{reason}, though not by kernel.io_uring_disabled; {instead}"),
            "a filter of system calls (seccomp) forbids it: `docker run --security-opt seccomp=…` with a profile that allows the three \
             io_uring calls, or `SystemCallFilter=` of the systemd unit",
        ),
        _ if cfg!(target_os = "linux") => Finding::better(
            "io_uring",
            format!("{reason}; {instead}"),
            "use Linux 5.11 or newer, outside of a filter of system calls",
        ),
        // The user can do nothing about this.
        _ => Finding::ok("io_uring", format!("{reason}; {instead}")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::super::tests::system;
    use super::*;

    const HEAD: &str = "Limit                     Soft Limit           Hard Limit           Units     \n";

    fn limits(locked: &str, files: &str) -> String {
        format!(
            "{HEAD}Max open files            {files}      4096     files     \nMax locked memory         {locked}      8388608     bytes\n"
        )
    }

    #[test]
    fn locked_memory_is_compared_with_what_slots_may_take() {
        let of = |locked, status| {
            let root = system(&[("proc/self/limits", &limits(locked, "1024")), ("proc/self/status", status)]);
            locked_memory(root.path(), 1 << 30).unwrap().verdict
        };
        let plain = "Name:\tsluice\nCapEff:\t0000000000000000\n";
        assert_eq!(of("8388608", plain), Verdict::CouldBeBetter);
        assert_eq!(of("2147483648", plain), Verdict::Ok);
        assert_eq!(of("unlimited", plain), Verdict::Ok);
        assert_eq!(of("8388608", "CapEff:\t0000000000004000\n"), Verdict::Ok);
        assert_eq!(of("8388608", ""), Verdict::CouldBeBetter);
        assert_eq!(locked_memory(system(&[]).path(), 1), None);
    }

    #[test]
    fn open_files_are_counted() {
        let of = |files| open_files(system(&[("proc/self/limits", &limits("1", files))]).path()).unwrap().verdict;
        assert_eq!((of("64"), of("1024"), of("unlimited")), (Verdict::CouldBeBetter, Verdict::Ok, Verdict::Ok));
        assert_eq!(open_files(system(&[("proc/self/limits", HEAD)]).path()), None);
    }

    #[test]
    fn whoever_forbids_io_uring_is_named() {
        let refused: Result<(), String> = Err("io_uring is forbidden here".into());
        let of = |files: &[(&str, &str)], tried: &Result<(), String>| io_uring(system(files).path(), tried);
        assert_eq!(of(&[], &Ok(())).verdict, Verdict::Ok);
        let place = "proc/sys/kernel/io_uring_disabled";
        assert!(of(&[(place, "2\n")], &refused).mend.unwrap().contains("sysctl"));
        assert!(of(&[(place, "0\n")], &refused).mend.unwrap().contains("seccomp"));
        assert!(of(&[], &refused).is.contains("threads read instead"));
    }
}
