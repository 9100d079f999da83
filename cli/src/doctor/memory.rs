//! Checks memory: the amount, limits of control groups, swap, and huge pages.

use std::path::Path;

use sluice_lab::estimate::Needs;
use sluice_model::memory::{Bytes, GroupLimit, SystemMemory};

use super::{Finding, chosen, read};

/// With less available memory than this, only small models run.
const LITTLE: u64 = 4 << 30;

/// Checks the memory of the system. `available`: bytes that this process may take. `needs`: those of a model, if one is checked.
pub(crate) fn memory(system: &SystemMemory, available: u64, needs: Option<&Needs>) -> Finding {
    let total = system.total.map_or("an unknown amount".to_owned(), |total| Bytes(total).to_string());
    let is = format!("{total}, {} of it available to this program", Bytes(available));
    match needs {
        Some(needs) if available < needs.least_memory => Finding::wrong(
            "memory",
            format!("{is}; the model needs at least {}", Bytes::at_least(needs.least_memory)),
            "end other programs, add memory, or convert the model to a smaller type: `sluice plan` says what each needs",
        ),
        Some(needs) => Finding::ok(
            "memory",
            format!(
                "{is}; the model needs at least {}, and with {} nothing is read twice",
                Bytes::at_least(needs.least_memory),
                Bytes(needs.best_memory)
            ),
        ),
        None if available < LITTLE => Finding::better(
            "memory",
            is,
            "end other programs: what is available holds experts that need not be read again",
        ),
        None => Finding::ok("memory", is),
    }
}

/// Checks the limits of control groups; limits above the memory of the machine do not count.
pub(crate) fn control_groups(limits: &[GroupLimit], total: Option<u64>) -> Finding {
    let binding = limits.iter().filter(|group| group.limit < total.unwrap_or(u64::MAX >> 1));
    let Some(group) = binding.min_by_key(|group| group.allows) else {
        return Finding::ok("control group", "no limit below the memory of the machine");
    };
    Finding::better(
        "control group",
        format!("{} allows {}; {} are left", group.folder.display(), Bytes(group.limit), Bytes(group.allows)),
        "if the program may have more, raise the limit: `docker run --memory`, `MemoryMax=` of a systemd unit, or memory.max of \
         the group",
    )
}

/// Checks swap. It holds no experts, which are read again instead; it helps other programs make room.
pub(crate) fn swap(system: &SystemMemory) -> Option<Finding> {
    let (all, free) = (system.swap?, system.swap_free?);
    let used = all.saturating_sub(free);
    Some(match all {
        0 => Finding::ok("swap", "none"),
        // Swap always holds some pages that are never used.
        _ if used > all / 2 => Finding::better(
            "swap",
            format!("{} of {} are in use", Bytes(used), Bytes(all)),
            "the system is short of memory: end other programs, or give this one a smaller --budget, since an expert in swap is \
             slower than one that is read from the model file",
        ),
        _ => Finding::ok("swap", format!("{}, {} of it in use", Bytes(all), Bytes(used))),
    })
}

/// Checks huge pages, to which drives write faster.
pub(crate) fn huge_pages(root: &Path) -> Option<Finding> {
    let text = read(root, "sys/kernel/mm/transparent_hugepage/enabled")?;
    Some(match chosen(&text) {
        Some("never") => Finding::better(
            "huge pages",
            "turned off, which can cost a large part of the drive's bandwidth",
            "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
        ),
        Some(word) => Finding::ok("huge pages", format!("{word}: expert slots have them")),
        None => Finding::ok("huge pages", text),
    })
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::super::tests::system;
    use super::*;

    const GIB: u64 = 1 << 30;

    fn needs(least: u64) -> Needs {
        Needs {
            least_memory: least,
            best_memory: 2 * least,
            dense_bytes: 0,
            kv_cache_bytes: 0,
            expert_bytes: 0,
            smallest_expert_bytes: 0,
            experts: 0,
            experts_per_token: 0,
            token_cycle_bytes: 0,
            token_cycle_stored: 0,
        }
    }

    #[test]
    fn memory_is_compared_with_what_a_model_needs() {
        let here = SystemMemory { total: Some(32 * GIB), ..SystemMemory::default() };
        assert_eq!(memory(&here, 30 * GIB, None).verdict, Verdict::Ok);
        assert_eq!(memory(&here, GIB, None).verdict, Verdict::CouldBeBetter);
        assert_eq!(memory(&here, 3 * GIB, Some(&needs(2 * GIB))).verdict, Verdict::Ok);
        let found = memory(&here, 3 * GIB, Some(&needs(4 * GIB)));
        assert_eq!(found.verdict, Verdict::Wrong);
        assert!(found.is.contains("at least 4.0 GiB") && found.mend.unwrap().contains("sluice plan"), "{}", found.is);
    }

    #[test]
    fn only_limits_below_the_memory_count() {
        let group = |limit, allows| GroupLimit { folder: "/sys/fs/cgroup/x".into(), limit, allows };
        let total = Some(8 * GIB);
        assert_eq!(control_groups(&[], total).verdict, Verdict::Ok);
        assert_eq!(control_groups(&[group(i64::MAX as u64, 5), group(9 * GIB, 1)], total).verdict, Verdict::Ok);
        let found = control_groups(&[group(6 * GIB, 3 * GIB), group(4 * GIB, 2 * GIB)], total);
        assert_eq!(found.verdict, Verdict::CouldBeBetter);
        assert!(found.is.contains("allows 4.0 GiB") && found.is.contains("2.0 GiB are left"), "{}", found.is);
        // If the memory is unknown, "no limit" is still no limit.
        assert_eq!(control_groups(&[group(i64::MAX as u64, 5)], None).verdict, Verdict::Ok);
    }

    #[test]
    fn swap_in_use_is_a_sign() {
        let with = |swap, swap_free| SystemMemory { swap, swap_free, ..SystemMemory::default() };
        assert_eq!(swap(&with(None, None)), None);
        assert_eq!(swap(&with(Some(0), Some(0))).unwrap().verdict, Verdict::Ok);
        assert_eq!(swap(&with(Some(GIB), Some(GIB))).unwrap().verdict, Verdict::Ok);
        assert_eq!(swap(&with(Some(GIB), Some(GIB / 4))).unwrap().verdict, Verdict::CouldBeBetter);
    }

    #[test]
    fn huge_pages_are_on_or_off() {
        let place = "sys/kernel/mm/transparent_hugepage/enabled";
        let of = |text| huge_pages(system(&[(place, text)]).path()).map(|found| found.verdict);
        assert_eq!(of("always [madvise] never\n"), Some(Verdict::Ok));
        assert_eq!(of("[always] madvise never\n"), Some(Verdict::Ok));
        assert_eq!(of("always madvise [never]\n"), Some(Verdict::CouldBeBetter));
        assert_eq!(huge_pages(system(&[]).path()), None);
    }
}
