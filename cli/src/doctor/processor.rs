//! Checks the processor: cores, threads, instruction sets.

use std::collections::BTreeSet;
use std::path::Path;

use sluice_kernels::{IsaError, Kernels};

use super::{Finding, read};
use crate::terminal::counted;

/// Name, cores and threads. `allowed`: threads that this process may use at once.
pub(crate) fn processor(root: &Path, allowed: usize) -> Finding {
    let model = read(root, "proc/cpuinfo").and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'))?;
        Some(line.1.trim().to_owned())
    });
    let name = model.map_or(String::new(), |name| format!("{name}; "));
    let Some((cores, threads)) = topology(root) else {
        return Finding::ok("processor", format!("{name}{}", counted(allowed, "thread")));
    };
    let threads_per_core =
        if threads > cores { format!(" with {} threads each", threads.div_ceil(cores)) } else { String::new() };
    let is = format!("{name}{}{threads_per_core}", counted(cores, "core"));
    if allowed < cores {
        return Finding::better(
            "processor",
            format!("{is}; this program may use {allowed}"),
            "if it may have more, raise the limit: `docker run --cpus`, `CPUQuota=` of a systemd unit, or `taskset`",
        );
    }
    Finding::ok("processor", is)
}

/// Number of cores and hardware threads that are online.
fn topology(root: &Path) -> Option<(usize, usize)> {
    let folder = root.join("sys/devices/system/cpu");
    let is_processor = |name: &str| {
        name.strip_prefix("cpu").is_some_and(|n| !n.is_empty() && n.bytes().all(|digit| digit.is_ascii_digit()))
    };
    let mut threads = 0;
    let mut cores = BTreeSet::new();
    for entry in folder.read_dir().ok()?.flatten() {
        if entry.file_name().to_str().is_none_or(|name| !is_processor(name)) {
            continue;
        }
        // A thread that is offline has no topology.
        let place = |name: &str| read(&entry.path(), Path::new("topology").join(name));
        let (Some(package), Some(core)) = (place("physical_package_id"), place("core_id")) else { continue };
        threads += 1;
        cores.insert((package, core));
    }
    (threads > 0).then_some((cores.len(), threads))
}

/// The instruction set in use, among those that are available; `chosen` is the choice, or why it is refused.
pub(crate) fn instructions(chosen: &Result<Kernels, IsaError>) -> Finding {
    let names: Vec<_> = Kernels::available().iter().map(Kernels::isa_name).collect();
    verdict(&chosen.as_ref().map(Kernels::isa_name).map_err(ToString::to_string), &names)
}

/// `available`: slowest first.
fn verdict(chosen: &Result<&str, String>, available: &[&str]) -> Finding {
    let best = available.last().copied().unwrap_or("scalar");
    match chosen {
        Err(refused) => {
            Finding::wrong("instructions", refused, "unset SLUICE_ISA: the fastest are chosen by themselves")
        }
        Ok(name) if *name != best => Finding::better(
            "instructions",
            format!("{name}, as SLUICE_ISA says, though this processor has {best}"),
            "unset SLUICE_ISA: all give the same text, and the fastest are chosen by themselves",
        ),
        Ok("scalar") => Finding::better(
            "instructions",
            "scalar: this processor has none of those that there are fast kernels for",
            "use a processor with AVX2, AVX-512 or NEON",
        ),
        Ok(name) => Finding::ok("instructions", (*name).to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::super::tests::system;
    use super::*;

    #[test]
    fn cores_and_threads_are_told_apart() {
        let mut files = vec![("proc/cpuinfo".to_owned(), "processor : 0\nmodel name\t: Fast One\n")];
        for (cpu, core) in [(0, "0\n"), (1, "0\n"), (2, "1\n"), (3, "1\n")] {
            let folder = format!("sys/devices/system/cpu/cpu{cpu}/topology");
            files.push((format!("{folder}/physical_package_id"), "0\n"));
            files.push((format!("{folder}/core_id"), core));
        }
        // An offline thread, and a folder that is not a processor.
        files.push(("sys/devices/system/cpu/cpu4/online".to_owned(), "0\n"));
        files.push(("sys/devices/system/cpu/cpufreq/boost".to_owned(), "1\n"));
        let files: Vec<_> = files.iter().map(|(name, text)| (name.as_str(), *text)).collect();
        let root = system(&files);
        let found = processor(root.path(), 4);
        assert_eq!((found.is.as_str(), found.verdict), ("Fast One; 2 cores with 2 threads each", Verdict::Ok));
        assert_eq!(processor(root.path(), 1).verdict, Verdict::CouldBeBetter);
        assert_eq!(processor(system(&[]).path(), 3).is, "3 threads");
    }

    #[test]
    fn the_fastest_instructions_should_be_in_use() {
        let all = ["scalar", "avx2", "avx512"];
        assert_eq!(verdict(&Ok("avx512"), &all).verdict, Verdict::Ok);
        assert!(verdict(&Ok("avx2"), &all).mend.unwrap().contains("unset SLUICE_ISA"));
        assert_eq!(verdict(&Ok("scalar"), &["scalar"]).verdict, Verdict::CouldBeBetter);
        assert_eq!(verdict(&Err("SLUICE_ISA=x".into()), &all).verdict, Verdict::Wrong);
    }
}
