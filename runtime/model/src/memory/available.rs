//! How much memory the system still allows.

use std::fs;
use std::path::{Path, PathBuf};

/// Bytes that this process may take: limited by available memory, and by every control group that holds it.
pub fn available_memory() -> u64 {
    let system = meminfo_available(Path::new("/proc/meminfo")).or_else(physical_memory).unwrap_or(u64::MAX);
    group_limits(Path::new("/")).iter().map(|group| group.allows).fold(system, u64::min)
}

/// A system's memory as a whole, in bytes; `None` for figures that the system does not give.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SystemMemory {
    /// All memory.
    pub total: Option<u64>,
    /// Memory that programs can have without swapping.
    pub available: Option<u64>,
    /// Swap, used or not.
    pub swap: Option<u64>,
    /// Swap that is not used.
    pub swap_free: Option<u64>,
}

impl SystemMemory {
    /// The memory of the system whose root folder is `root`: `/`, except in tests.
    #[must_use]
    pub fn read(root: &Path) -> SystemMemory {
        let text = fs::read_to_string(root.join("proc/meminfo")).unwrap_or_default();
        let is_real = root == Path::new("/");
        SystemMemory {
            total: meminfo(&text, "MemTotal:").or_else(|| physical_memory().filter(|_| is_real)),
            available: meminfo(&text, "MemAvailable:"),
            swap: meminfo(&text, "SwapTotal:"),
            swap_free: meminfo(&text, "SwapFree:"),
        }
    }
}

/// A memory limit of a control group that holds this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupLimit {
    /// The group's folder.
    pub folder: PathBuf,
    /// The limit, in bytes; near 2^63 where the first version of control groups means none.
    pub limit: u64,
    /// Bytes below the limit that are free or can be freed.
    pub allows: u64,
}

/// The limits of all control groups (v1 and v2) that hold this process, from its own up, in the system whose root folder is
/// `root`: `/`, except in tests.
#[must_use]
pub fn group_limits(root: &Path) -> Vec<GroupLimit> {
    let list = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    groups_of(&list, &root.join("sys/fs/cgroup")).iter().filter_map(Group::limit).collect()
}

pub(super) fn meminfo_available(path: &Path) -> Option<u64> {
    meminfo(&fs::read_to_string(path).ok()?, "MemAvailable:")
}

/// Bytes after a word at the beginning of a line of `/proc/meminfo`.
fn meminfo(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

fn physical_memory() -> Option<u64> {
    use nix::unistd::{SysconfVar, sysconf};
    #[cfg(not(target_os = "macos"))]
    let pages = sysconf(SysconfVar::_PHYS_PAGES).ok()??;
    #[cfg(target_os = "macos")]
    let pages = sluice_storage::io::physical_pages()?;
    let page = sysconf(SysconfVar::PAGE_SIZE).ok()??;
    u64::try_from(pages).ok()?.checked_mul(u64::try_from(page).ok()?)
}

/// Names in the two versions of control groups: of limits, of the memory in use, and of the part of it that can be dropped.
#[derive(Debug)]
struct Names {
    /// Beyond the lowest of these limits, processes are killed or slowed down.
    limits: &'static [&'static str],
    usage: &'static str,
    /// Lines of `memory.stat`: pages of files, which count as in use.
    droppable: [&'static str; 2],
}

const V1: Names = Names {
    limits: &["memory.limit_in_bytes"],
    usage: "memory.usage_in_bytes",
    droppable: ["total_inactive_file", "total_active_file"],
};
const V2: Names = Names {
    limits: &["memory.max", "memory.high"],
    usage: "memory.current",
    droppable: ["inactive_file", "active_file"],
};

/// A control group: its folder, and the names of its files.
#[derive(Debug)]
pub(super) struct Group {
    folder: PathBuf,
    names: &'static Names,
}

impl Group {
    /// The text of one of its files.
    pub(super) fn read(&self, name: &str) -> Option<String> {
        fs::read_to_string(self.folder.join(name)).ok()
    }

    /// Bytes below the limit, if there is one, that are free or can be freed.
    pub(super) fn allows(&self) -> Option<u64> {
        self.limit().map(|limit| limit.allows)
    }

    /// The limit, if there is one.
    fn limit(&self) -> Option<GroupLimit> {
        let number = |name: &str| self.read(name)?.trim().parse::<u64>().ok();
        // "max" is not a number, and v1's "no limit" (near 2^63) has no effect.
        let limit = self.names.limits.iter().filter_map(|name| number(name)).min()?;
        let stat = self.read("memory.stat").unwrap_or_default();
        let droppable = self.names.droppable.iter().filter_map(|name| value_of(&stat, name)).sum();
        let used = number(self.names.usage).unwrap_or(0).saturating_sub(droppable);
        Some(GroupLimit { folder: self.folder.clone(), limit, allows: limit.saturating_sub(used) })
    }
}

/// The number after a word at the beginning of a line.
fn value_of(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

/// The control groups (v1 and v2) that hold this process, from its own up to the root, as `/proc/self/cgroup` lists them.
pub(super) fn groups_of(list: &str, mounted: &Path) -> Vec<Group> {
    let mut groups = Vec::new();
    for line in list.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else { continue };
        let (root, names) = match controllers {
            "" => (mounted.to_owned(), &V2),
            c if c.split(',').any(|c| c == "memory") => (mounted.join("memory"), &V1),
            _ => continue,
        };
        let own = root.join(path.trim_start_matches('/'));
        let up = own.ancestors().take_while(|folder| folder.starts_with(&root));
        // In a container, the path is the host's, and the container's own group is mounted at the root, which is among these.
        groups.extend(up.map(|folder| Group { folder: folder.to_owned(), names }));
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_memory_is_available() {
        assert!(available_memory() > 1 << 20);
    }

    fn least(list: &str, mounted: &Path) -> Option<u64> {
        groups_of(list, mounted).iter().filter_map(Group::allows).min()
    }

    fn write(root: &Path, files: &[(&str, &str)]) {
        for (name, text) in files {
            let path = root.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
    }

    #[test]
    fn a_system_says_what_it_has() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        assert_eq!(SystemMemory::read(root), SystemMemory::default());
        let text = "MemTotal:  2048 kB\nMemAvailable:    1024 kB\nSwapTotal: 8 kB\nSwapFree:  x kB\n";
        write(root, &[("proc/meminfo", text), ("proc/self/cgroup", "0::/a\n")]);
        write(root, &[("sys/fs/cgroup/a/memory.max", "900"), ("sys/fs/cgroup/a/memory.current", "300")]);
        let said = SystemMemory::read(root);
        assert_eq!((said.total, said.available), (Some(2 << 20), Some(1 << 20)));
        assert_eq!((said.swap, said.swap_free), (Some(8192), None));
        let folder = root.join("sys/fs/cgroup/a");
        assert_eq!(group_limits(root), [GroupLimit { folder, limit: 900, allows: 600 }]);
        assert!(SystemMemory::read(Path::new("/")).total > Some(1 << 20));
    }

    #[test]
    fn groups_allow_what_is_below_their_limits() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        // No limit at all, in either version.
        write(root, &[("a/b/memory.max", "max\n"), ("memory/x/memory.limit_in_bytes", "9223372036854771712\n")]);
        assert_eq!(least("0::/a/b\n", root), None);
        assert!(least("4:memory:/x\n", root) > Some(1 << 62));
        // Memory in use counts, except pages of files.
        let stat = "anon 500\ninactive_file 100\nactive_file 30\ninactive_file_more 7\n";
        write(root, &[("a/memory.max", "2000\n"), ("a/memory.current", "700\n"), ("a/memory.stat", stat)]);
        assert_eq!(least("0::/a/b\n", root), Some(2000 - (700 - 130)));
        // The softer limit counts too, and so does the limit of the innermost group.
        write(root, &[("a/memory.high", "1000\n")]);
        assert_eq!(least("1:cpu:/a\n0::/a/b\n", root), Some(430));
        write(root, &[("a/b/memory.max", "90\n"), ("a/b/memory.current", "100\n")]);
        assert_eq!(least("0::/a/b\n", root), Some(0));
        let stat = "inactive_file 1\ntotal_inactive_file 5\ntotal_active_file 6\n";
        write(root, &[("memory/memory.limit_in_bytes", "80"), ("memory/memory.usage_in_bytes", "31")]);
        write(root, &[("memory/memory.stat", stat)]);
        assert_eq!(least("2:cpu,memory:/of/the/host\n", root), Some(60));
    }
}
