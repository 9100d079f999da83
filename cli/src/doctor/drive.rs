//! Checks the folder of the models: filesystem, direct reads, the drive, and whether it has been measured.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use sluice_model::memory::Bytes;
use sluice_storage::io::calibration::{CalibrationError, DeviceId};
use sluice_storage::io::{Calibration, DirectIo};

use super::{Finding, chosen, read};

/// Filesystems whose reads go over a network or through another program.
const DISTANT: [&str; 9] = ["nfs", "nfs4", "cifs", "smb3", "9p", "virtiofs", "fuse", "ceph", "sshfs"];
/// Filesystems whose files are in memory already.
const IN_MEMORY: [&str; 2] = ["tmpfs", "ramfs"];
/// Seconds after which a drive should be measured again, because filesystems and drives age.
const OLD: u64 = 365 * 24 * 60 * 60;

/// A filesystem that is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mount {
    /// Its mount point.
    point: PathBuf,
    /// Its type, such as `ext4`.
    kind: String,
    /// Its device, such as `/dev/nvme0n1p2`.
    source: String,
}

impl Mount {
    /// The mount of a folder, whose path must contain no links.
    pub(crate) fn of(root: &Path, folder: &Path) -> Option<Mount> {
        let text = read(root, "proc/self/mountinfo")?;
        let mounts = text.lines().filter_map(Mount::parse).filter(|mount| folder.starts_with(&mount.point));
        // If two have the same place, the later one hides the other.
        mounts.max_by_key(|mount| mount.point.components().count())
    }

    /// `36 35 98:0 / /mnt rw,noatime shared:1 - ext3 /dev/root rw`
    fn parse(line: &str) -> Option<Mount> {
        let (place, what) = line.split_once(" - ")?;
        let point = unescape(place.split(' ').nth(4)?);
        let mut what = what.split(' ');
        Some(Mount { point: point.into(), kind: what.next()?.to_owned(), source: unescape(what.next()?) })
    }
}

/// The kernel writes a space as `\040`.
fn unescape(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(text.to_owned(), |text, (code, character)| text.replace(code, character))
}

/// Checks the filesystem: its type and its free space.
pub(crate) fn filesystem(mount: &Mount, free: Option<u64>) -> Finding {
    let free = free.map_or(String::new(), |free| format!(", {} free", Bytes(free)));
    let is = format!("{} at {}{free}", mount.kind, mount.point.display());
    let is_one_of = |kinds: &[&str]| kinds.iter().any(|kind| mount.kind.split('.').next() == Some(*kind));
    if is_one_of(&DISTANT) {
        return Finding::better(
            "filesystem",
            format!("{is}: every read goes over a network or through another program"),
            "keep the model file on a drive of this machine, on ext4, xfs or btrfs",
        );
    }
    if is_one_of(&IN_MEMORY) {
        return Finding::better(
            "filesystem",
            format!("{is}: the model file is in memory as a whole, and the budget comes on top"),
            "keep the model file on a drive",
        );
    }
    if is_one_of(&["overlay"]) {
        return Finding::better(
            "filesystem",
            format!("{is}: the layers of a container"),
            "keep the model file in a volume: `docker run -v /fast/models:/models`",
        );
    }
    Finding::ok("filesystem", is)
}

/// Checks whether reads bypass the page cache.
pub(crate) fn direct(direct: &DirectIo) -> Finding {
    match direct {
        DirectIo::Engaged { .. } => Finding::ok("direct reads", direct.to_string()),
        DirectIo::Refused { .. } => Finding::better(
            "direct reads",
            direct.to_string(),
            "keep the model file on a filesystem that has direct I/O, such as ext4, xfs or btrfs without compression",
        ),
    }
}

/// Checks the drive of a mount. `device`: its number, such as `259:2`.
pub(crate) fn drive(root: &Path, device: &str, mount: Option<&Mount>) -> Option<Finding> {
    let block = root.join("sys/dev/block").join(device).canonicalize().ok().or_else(|| {
        // Filesystems such as btrfs have their own device numbers.
        let source = Path::new(&mount?.source);
        let name = source.canonicalize().ok().unwrap_or_else(|| source.to_owned());
        root.join("sys/class/block").join(name.file_name()?).canonicalize().ok()
    })?;
    let disk = if block.join("partition").exists() { block.parent()?.to_owned() } else { block };
    let name = disk.file_name()?.to_str()?.to_owned();
    let model = read(&disk, "device/model").filter(|model| !model.is_empty());
    let model = model.map_or(String::new(), |model| format!(" {model}"));
    let kind = kind(&disk, &name);
    let scheduler = read(&disk, "queue/scheduler").unwrap_or_default();
    let scheduler = chosen(&scheduler).unwrap_or("").to_owned();
    let scheduled = if scheduler.is_empty() { String::new() } else { format!(", scheduler {scheduler}") };
    let is = format!("{name}{model} ({kind}){scheduled}");
    let is_rotating = read(&disk, "queue/rotational").as_deref() == Some("1");
    if is_rotating && !name.starts_with("vd") {
        return Some(Finding::better(
            "drive",
            format!("{is}: a disk that spins, which reads experts a hundred times slower than an SSD"),
            "keep the model file on an SSD, best on one with NVMe",
        ));
    }
    if matches!(scheduler.as_str(), "bfq" | "cfq") {
        return Some(Finding::better(
            "drive",
            format!("{is}: this scheduler orders reads for disks that spin, and takes time"),
            format!("echo none | sudo tee /sys/block/{name}/queue/scheduler"),
        ));
    }
    if kind.starts_with("USB") || kind.starts_with("SD") {
        let mend = "keep the model file on a drive inside of the machine, if it has a faster one: `sluice bench disk` measures";
        return Some(Finding::better("drive", is, mend));
    }
    Some(Finding::ok("drive", is))
}

/// How a disk is connected, in words.
fn kind(disk: &Path, name: &str) -> String {
    let slaves: Vec<_> = disk.join("slaves").read_dir().into_iter().flatten().flatten().collect();
    if !slaves.is_empty() {
        let mut names: Vec<_> = slaves.iter().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        return format!("made of {}", names.join(", "));
    }
    let is_usb = disk.components().any(|part| part.as_os_str().to_string_lossy().starts_with("usb"));
    let kinds =
        [("nvme", "NVMe"), ("vd", "virtual"), ("xvd", "virtual"), ("mmcblk", "SD card or eMMC"), ("loop", "a file")];
    match kinds.iter().find(|(prefix, _)| name.starts_with(prefix)) {
        _ if is_usb => "USB".to_owned(),
        Some((_, kind)) => (*kind).to_owned(),
        None => "SATA, SAS or SCSI".to_owned(),
    }
}

/// Checks whether the drive has been measured, and when. `found`: all drives that have been measured. `now`: seconds since 1970.
/// `path`: the path to measure.
pub(crate) fn calibration(
    found: &Result<Vec<Calibration>, CalibrationError>,
    device: &DeviceId,
    now: u64,
    path: &Path,
) -> Finding {
    let command = format!("sluice bench disk {}", path.display());
    let all = match found {
        Ok(all) => all,
        Err(problem) => return Finding::better("calibration", problem.to_string(), command),
    };
    let Some(own) = all.iter().find(|known| known.device.is_same(device)) else {
        let others = match all.len() {
            0 => String::new(),
            1 => "; another drive has one".to_owned(),
            n => format!("; {n} other drives have one"),
        };
        return Finding::better(
            "calibration",
            format!("none for this drive{others}: it is read as most are read best"),
            command,
        );
    };
    let age = own.made.map(|made| now.saturating_sub(made));
    let days = age.map_or("at an unknown time".to_owned(), |age| match age / (24 * 60 * 60) {
        0 => "today".to_owned(),
        1 => "yesterday".to_owned(),
        days => format!("{days} days ago"),
    });
    let is = format!(
        "found {days} for this drive: {} with chunks of {}, {} in flight, {}/s",
        own.engine.name(),
        Bytes(own.chunk_bytes as u64),
        own.depth,
        Bytes(own.bytes_per_second as u64)
    );
    if age.is_some_and(|age| age > OLD) {
        return Finding::better("calibration", format!("{is}; that is long ago"), command);
    }
    Finding::ok("calibration", is)
}

/// The folder of a file, or a folder itself, with links resolved.
pub(crate) fn folder_of(path: &Path) -> io::Result<PathBuf> {
    let whole = fs::canonicalize(path)?;
    let folder = if whole.is_dir() { &whole } else { whole.parent().unwrap_or(&whole) };
    Ok(folder.to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::super::tests::system;
    use super::*;
    use sluice_storage::io::bench::BenchEngine;
    use std::os::unix::fs::symlink;

    const MOUNTS: &str = "\
22 1 259:2 / / rw,relatime - ext4 /dev/nvme0n1p2 rw
40 22 0:35 / /mnt/nas rw shared:1 - nfs4 nas:/x rw
41 22 0:36 / /mnt/with\\040space rw - btrfs /dev/sda1 rw
42 22 0:37 / /mnt/mine rw - fuse.sshfs me@there rw
43 22 0:38 / /dev/shm rw - tmpfs shm rw
";

    #[test]
    fn the_innermost_mount_counts() {
        let root = system(&[("proc/self/mountinfo", MOUNTS)]);
        let of = |folder: &str| Mount::of(root.path(), Path::new(folder)).unwrap();
        assert_eq!((of("/home/me").kind.as_str(), of("/mnt").source.as_str()), ("ext4", "/dev/nvme0n1p2"));
        assert_eq!(of("/mnt/with space/models").kind, "btrfs");
        let verdict = |folder: &str| filesystem(&of(folder), Some(1 << 30)).verdict;
        assert_eq!((verdict("/home"), verdict("/mnt/with space")), (Verdict::Ok, Verdict::Ok));
        for worse in ["/mnt/nas/models", "/mnt/mine", "/dev/shm/x"] {
            assert_eq!(verdict(worse), Verdict::CouldBeBetter, "{worse}");
        }
        assert!(filesystem(&of("/"), Some(1 << 30)).is.contains("1.0 GiB free"));
        assert_eq!(Mount::of(system(&[]).path(), Path::new("/")), None);
    }

    /// A disk with one partition, as `/sys` shows it.
    fn disk(place: &str, number: &str, rotational: &str, scheduler: &str) -> tempfile::TempDir {
        let files = [
            (format!("{place}/queue/rotational"), rotational),
            (format!("{place}/queue/scheduler"), scheduler),
            (format!("{place}/device/model"), "Some Drive 1TB   \n"),
            (format!("{place}/part1/partition"), "1\n"),
        ];
        let files: Vec<_> = files.iter().map(|(name, text)| (name.as_str(), *text)).collect();
        let root = system(&files);
        fs::create_dir_all(root.path().join("sys/dev/block")).unwrap();
        symlink(root.path().join(place).join("part1"), root.path().join("sys/dev/block").join(number)).unwrap();
        root
    }

    #[test]
    fn drives_are_told_by_kind() {
        let found = |place: &str, rotational, scheduler| {
            let root = disk(place, "8:1", rotational, scheduler);
            drive(root.path(), "8:1", None).unwrap()
        };
        let fast = found("sys/devices/pci0/nvme/nvme0n1", "0\n", "[none] mq-deadline\n");
        assert_eq!((fast.verdict, fast.is.as_str()), (Verdict::Ok, "nvme0n1 Some Drive 1TB (NVMe), scheduler none"));
        let spinning = found("sys/devices/ata1/sda", "1\n", "[mq-deadline] none\n");
        assert!(spinning.is.contains("a disk that spins") && spinning.verdict == Verdict::CouldBeBetter);
        // Hypervisors report this for SSDs as well.
        assert_eq!(found("sys/devices/virtio0/vda", "1\n", "[none]\n").verdict, Verdict::Ok);
        let sorted = found("sys/devices/ata1/sdb", "0\n", "none [bfq]\n");
        assert_eq!(sorted.mend.as_deref(), Some("echo none | sudo tee /sys/block/sdb/queue/scheduler"));
        assert_eq!(found("sys/devices/usb2/2-1/sdc", "0\n", "[none]\n").verdict, Verdict::CouldBeBetter);
        assert_eq!(drive(system(&[]).path(), "0:35", None), None);
    }

    #[test]
    fn filesystems_with_numbers_of_their_own_are_found_by_name() {
        let root = disk("sys/devices/ata1/sda", "8:1", "0\n", "[none]\n");
        fs::create_dir_all(root.path().join("sys/class/block")).unwrap();
        let partition = root.path().join("sys/devices/ata1/sda/part1");
        symlink(partition, root.path().join("sys/class/block/no-such-device1")).unwrap();
        let mount = Mount { point: "/".into(), kind: "btrfs".into(), source: "/dev/no-such-device1".into() };
        assert!(drive(root.path(), "0:36", Some(&mount)).unwrap().is.starts_with("sda Some Drive"));
    }

    fn device(filesystem: &str) -> DeviceId {
        DeviceId { filesystem: filesystem.into(), device: "8:1".into(), model: None }
    }

    #[test]
    fn a_calibration_belongs_to_a_drive_and_ages() {
        let made = |made| Calibration {
            device: device("aa"),
            engine: BenchEngine::Uring,
            chunk_bytes: 1 << 20,
            depth: 4,
            prefetch_depth: 4,
            bytes_per_second: 3.0 * f64::from(1 << 30),
            latency: None,
            made,
        };
        let of = |all: Vec<Calibration>, id: &str| calibration(&Ok(all), &device(id), 10 * OLD, Path::new("m.sluice"));
        let fresh = of(vec![made(Some(10 * OLD - 3 * 24 * 60 * 60))], "aa");
        assert_eq!(fresh.verdict, Verdict::Ok);
        assert!(
            fresh.is.contains("3 days ago") && fresh.is.contains("1.0 MiB, 4 in flight, 3.0 GiB/s"),
            "{}",
            fresh.is
        );
        assert_eq!(of(vec![made(None)], "aa").verdict, Verdict::Ok);
        assert_eq!(of(vec![made(Some(OLD))], "aa").verdict, Verdict::CouldBeBetter);
        let other = of(vec![made(None)], "bb");
        assert!(other.is.contains("another drive has one"), "{}", other.is);
        assert_eq!(other.mend.as_deref(), Some("sluice bench disk m.sluice"));
        let broken = calibration(&Err(CalibrationError::NoFolder), &device("aa"), 0, Path::new("."));
        assert!(broken.is.contains("XDG_CACHE_HOME"), "{}", broken.is);
    }
}
