//! Facilities that not every filesystem has (locks, syncs, the free space) are missed with a remark, and not the end. The
//! program runs under a filter that makes these calls fail as the kernel does where they do not exist.

use crate::common;

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::common::{demo_checkpoint, stderr, stdout};

/// A system call by its number, and the error that it gives.
type Lack = (libc::c_long, i32);

/// In the place of an error: the process ends.
const KILLED: i32 = 0;
/// What opens connections, and sends without.
const NO_CONNECTIONS: [libc::c_long; 2] = [libc::SYS_connect, libc::SYS_sendto];
const NO_SYNC: [libc::c_long; 2] = [libc::SYS_fsync, libc::SYS_fdatasync];
const NO_SPACE: [libc::c_long; 2] = [libc::SYS_statfs, libc::SYS_fstatfs];

/// A program for the kernel: these calls fail, all others are let through.
fn filter(lacks: &[Lack]) -> Vec<libc::sock_filter> {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    // The number of the call is the first word of what the filter sees.
    let mut program = vec![statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0)];
    for &(call, errno) in lacks {
        let code = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
        program.push(libc::sock_filter { code, jt: 0, jf: 1, k: call as u32 });
        let answer =
            if errno == KILLED { libc::SECCOMP_RET_KILL_PROCESS } else { libc::SECCOMP_RET_ERRNO | errno as u32 };
        program.push(statement(libc::BPF_RET | libc::BPF_K, answer));
    }
    program.push(statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW));
    program
}

/// Runs the program where these calls do not exist.
fn sluice_without(lacks: &[Lack], args: &[&str]) -> Output {
    let mut program = filter(lacks);
    let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
    command.args(args).stdin(Stdio::null()).env("XDG_CACHE_HOME", std::env::temp_dir().join("sluice-no-calibration"));
    // A hub that nobody is.
    command.env("HF_ENDPOINT", "http://127.0.0.1:9");
    let install = move || {
        let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
        // SAFETY: both calls only read their arguments, which live until they return; they allocate nothing and take no lock,
        // as is asked of what runs between fork and exec.
        let failed = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
                || libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) != 0
        };
        if failed { Err(std::io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: the closure does as `pre_exec` asks, see above.
    unsafe { command.pre_exec(install) };
    command.output().unwrap()
}

fn failing(calls: &[libc::c_long], errno: i32) -> Vec<Lack> {
    calls.iter().map(|&call| (call, errno)).collect()
}

/// Every command that writes or reads large files, with one set of calls that fail; returns what they remark.
fn files_work_without(lacks: &[Lack], folder: &Path) -> String {
    let at = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    let (checkpoint, model, random, text) = (demo_checkpoint(), at("m.sluice"), at("s.sluice"), at("t.txt"));
    let checkpoint = checkpoint.to_str().unwrap();
    fs::write(&text, "To be, or not to be: that is the question. ".repeat(4)).unwrap();
    let _ = fs::remove_file(at("m.sluice.counts"));
    let mut remarks = String::new();
    for args in [
        &["convert", checkpoint, &model, "--type", "q8", "--dense-type", "q8", "--overwrite"][..],
        &["verify", &model, "--source", checkpoint],
        &["run", &model, "--prompt", "To be", "-n", "3"],
        &["calibrate", &model, "--text", &text, "--out", &at("imatrix")],
        &["synth", checkpoint, &random, "--layers", "2", "--overwrite"],
        &["run", &random, "--prompt-ids", "1,2", "--ids", "-n", "2"],
    ] {
        let output = sluice_without(lacks, args);
        stdout(&output);
        remarks += &stderr(&output);
    }
    assert!(fs::exists(format!("{model}.counts")).unwrap(), "what was learned is kept");
    remarks
}

/// Measurements, on the model that has been made before.
fn benches_work_without(lacks: &[Lack], folder: &Path) {
    let at = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    for args in [
        &["bench", "decode", &at("m.sluice"), "-n", "2", "--warm-up", "2"][..],
        &["bench", "disk", &at("scratch"), "--size", "64MiB", "--seconds", "0.2", "--buffered"],
    ] {
        stdout(&sluice_without(lacks, args));
    }
}

#[test]
fn nothing_ends_for_want_of_locks_syncs_or_the_free_space() {
    let folder = tempfile::tempdir().unwrap();
    for (calls, errno, remark) in [
        (&[libc::SYS_flock][..], libc::ENOSYS, "cannot lock files"),
        (&[libc::SYS_flock], libc::ENOLCK, "cannot lock files"),
        (&[libc::SYS_flock], libc::EOPNOTSUPP, "cannot lock files"),
        // As sandboxes answer.
        (&[libc::SYS_flock], libc::EPERM, "cannot lock files"),
        (&NO_SPACE, libc::EPERM, "how much space is free"),
        (&NO_SYNC, libc::EINVAL, "cannot sync files"),
        (&NO_SYNC, libc::ENOSYS, "cannot sync files"),
        (&NO_SYNC, libc::EOPNOTSUPP, "cannot sync files"),
        (&NO_SPACE, libc::ENOSYS, "how much space is free"),
    ] {
        let remarks = files_work_without(&failing(calls, errno), folder.path());
        // Once for each file that is written with care.
        assert_eq!(remarks.matches(remark).count(), 2, "{errno}: {remarks}");
    }
    let advice = [libc::SYS_fallocate, libc::SYS_fadvise64, libc::SYS_madvise, libc::SYS_mincore, libc::SYS_statx];
    let all = [&[libc::SYS_flock][..], &NO_SYNC, &NO_SPACE, &advice].concat();
    files_work_without(&failing(&all, libc::ENOSYS), folder.path());
    benches_work_without(&failing(&all, libc::ENOSYS), folder.path());
    benches_work_without(&failing(&NO_SYNC, libc::EINVAL), folder.path());
}

#[test]
fn a_drive_that_fails_is_still_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("m.sluice");
    let (checkpoint, target) = (demo_checkpoint(), target.to_str().unwrap());
    for (calls, words) in [(&NO_SYNC[..], "cannot"), (&[libc::SYS_flock], "cannot lock it"), (&NO_SPACE, "free space")]
    {
        let args = ["convert", checkpoint.to_str().unwrap(), target];
        let output = sluice_without(&failing(calls, libc::EIO), &args);
        common::assert_fails(&output, 1, &[words, "Input/output error"]);
        assert!(!fs::exists(target).unwrap());
    }
}

#[test]
fn only_the_hub_s_commands_open_connections() {
    let folder = tempfile::tempdir().unwrap();
    let lacks = failing(&NO_CONNECTIONS, KILLED);
    files_work_without(&lacks, folder.path());
    benches_work_without(&lacks, folder.path());
    let model = folder.path().join("m.sluice");
    let model = model.to_str().unwrap();
    for args in [
        &["inspect", model][..],
        &["plan", model],
        &["tokenize", model, "--text", "a"],
        &["list"],
        &["inspect", "hf:a/b"],
    ] {
        let output = sluice_without(&lacks, args);
        assert!(output.status.code().is_some(), "{args:?} was killed: {}", stderr(&output));
    }
    // The filter would have shown it.
    let output = sluice_without(&lacks, &["pull", "a/b", "--to", folder.path().join("b").to_str().unwrap()]);
    assert_eq!(output.status.code(), None, "{}", stderr(&output));
}
