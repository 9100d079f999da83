//! Suggests files with names similar to one that does not exist.

use std::error::Error;
use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};

use sluice_format::VolumeName;

/// Similarity, by Jaro and Winkler, above which one name may be a typo of another; equal names have 1.
const ALIKE: f64 = 0.84;
/// Most names that are suggested, and most entries of a folder that are searched: a folder with a million files is not worth the
/// time.
const SUGGESTED: usize = 3;
const SEARCHED: usize = 20_000;

/// A sentence that names files similar to the missing one, if an argument of the command line names it.
pub(crate) fn suggestion<'a>(error: &dyn Error, arguments: impl IntoIterator<Item = &'a OsStr>) -> Option<String> {
    let said = error.to_string();
    if !is_missing(error) && !said.contains("there is no such") {
        return None;
    }
    let values = arguments.into_iter().map(|argument| match argument.to_str().and_then(|text| text.split_once('=')) {
        Some((option, value)) if option.starts_with("--") => Path::new(value),
        _ => Path::new(argument),
    });
    let missing = values.filter(|path| is_about(&said, path) && path.symlink_metadata().is_err());
    let missing: Vec<&Path> = missing.collect();
    if let Some(model) = missing.iter().find_map(|path| unfinished(path)) {
        return Some(format!(
            "{} is not finished: the command that writes it was interrupted, or is still at work. Run the same command again",
            model.display()
        ));
    }
    let found = missing.into_iter().find_map(near)?;
    let names: Vec<_> = found.iter().map(|path| path.display().to_string()).collect();
    Some(format!("did you mean {}?", names.join(" or ")))
}

/// What stands behind the name of a model file while it is written.
const PARTIAL: &str = ".partial";

/// The model of this name, if something is there that an interrupted conversion leaves.
fn unfinished(path: &Path) -> Option<PathBuf> {
    let whole = VolumeName::parse(path).map_or_else(|| path.to_owned(), |name| name.whole());
    let is_left = |suffix: &str| {
        let mut left = whole.clone().into_os_string();
        left.push(suffix);
        Path::new(&left).is_file()
    };
    [PARTIAL, ".partial.journal"].into_iter().any(is_left).then_some(whole)
}

/// Whether a file has the name of one that conversions leave, which nobody means.
fn is_remains(name: &str) -> bool {
    name.split_once(PARTIAL).is_some_and(|(_, rest)| rest.is_empty() || rest.starts_with(['-', '.']))
}

/// Whether a message begins with a path, as messages about files do.
fn is_about(said: &str, path: &Path) -> bool {
    let path = path.to_string_lossy();
    let rest = said.strip_prefix("cannot open ").unwrap_or(said).strip_prefix(&*path);
    !path.is_empty() && rest.is_some_and(|rest| rest.starts_with([':', ' ', ',']))
}

/// Whether the reason is that the system did not find a file.
fn is_missing(error: &dyn Error) -> bool {
    let mut cause = error.source();
    while let Some(error) = cause {
        if error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::NotFound) {
            return true;
        }
        cause = error.source();
    }
    false
}

/// Existing paths that differ from this one in its first missing part; the most similar first.
fn near(path: &Path) -> Option<Vec<PathBuf>> {
    let mut missing = path;
    // Finds the first part whose folder exists.
    while let Some(folder) = missing.parent().filter(|folder| !folder.as_os_str().is_empty() && !folder.exists()) {
        missing = folder;
    }
    let name = missing.file_name()?.to_str()?.to_lowercase();
    let folder = missing.parent().filter(|folder| !folder.as_os_str().is_empty());
    let rest = path.strip_prefix(missing).ok()?;
    let entries = folder.unwrap_or(Path::new(".")).read_dir().ok()?.flatten().take(SEARCHED);
    let mut alike: Vec<(f64, PathBuf)> = entries
        .filter_map(|entry| {
            let found = entry.file_name();
            let nearness =
                strsim::jaro_winkler(&name, &found.to_str().filter(|name| !is_remains(name))?.to_lowercase());
            let path = missing.with_file_name(&found).join(rest);
            // Joining an empty path would add a separator at the end.
            let path = if rest.as_os_str().is_empty() { missing.with_file_name(found) } else { path };
            (nearness >= ALIKE && path.exists()).then_some((nearness, path))
        })
        .collect();
    alike.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
    alike.truncate(SUGGESTED);
    (!alike.is_empty()).then(|| alike.into_iter().map(|(_, path)| path).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::CliError;
    use std::fs;

    fn suggested(folder: &Path, argument: &str) -> Option<String> {
        let path = folder.join(argument);
        let error = fs::File::open(&path).map_err(CliError::file(&path, "open it")).unwrap_err();
        let said = suggestion(&error, [OsStr::new("verify"), path.as_os_str()])?;
        Some(said.replace(&format!("{}/", folder.display()), ""))
    }

    #[test]
    fn names_that_are_alike_are_suggested() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        fs::create_dir(folder.join("models")).unwrap();
        for name in ["r1.sluice", "R1-q4.sluice", "notes.txt", "models/glm.sluice"] {
            fs::write(folder.join(name), "").unwrap();
        }
        let of = |argument| suggested(folder, argument);
        assert_eq!(of("r1.sluce").as_deref(), Some("did you mean r1.sluice or R1-q4.sluice?"));
        assert_eq!(of("model/glm.sluice").as_deref(), Some("did you mean models/glm.sluice?"));
        assert_eq!(of("models/gln.sluice").as_deref(), Some("did you mean models/glm.sluice?"));
        assert_eq!(of("zebra"), None);
        assert_eq!(of("nowhere/near/any.sluice"), None);
    }

    #[test]
    fn what_interrupted_conversions_leave_is_named_as_such() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        for name in
            ["m.sluice.partial", "m.sluice.partial.journal", "n.sluice.partial.journal", "r1.sluice.partial-00002"]
        {
            fs::write(folder.join(name), "").unwrap();
        }
        for (argument, model) in
            [("m.sluice", "m.sluice"), ("n.sluice", "n.sluice"), ("m-00001-of-00002.sluice", "m.sluice")]
        {
            let said = suggested(folder, argument).unwrap();
            assert!(said.starts_with(&format!("{model} is not finished")) && said.contains("again"), "{said}");
        }
        assert_eq!(suggested(folder, "r1.sluice"), None);
        assert_eq!(suggested(folder, "m.sluicee"), None);
    }

    #[test]
    fn only_what_is_missing_has_suggestions() {
        let folder = tempfile::tempdir().unwrap();
        let (there, missing) = (folder.path().join("there"), folder.path().join("ther"));
        fs::write(&there, "").unwrap();
        // The file exists, and something else is wrong with it.
        let error = CliError::file(&there, "read it")(io::ErrorKind::InvalidData.into());
        assert_eq!(suggestion(&error, [there.as_os_str()]), None);
        // A file that the command line does not name is missing.
        let error = CliError::file(&missing, "read it")(io::ErrorKind::NotFound.into());
        assert_eq!(suggestion(&error, [OsStr::new("run")]), None);
        // As the value of an option.
        let option = format!("--text={}", missing.display());
        assert!(suggestion(&error, [OsStr::new(&option)]).unwrap().contains("there"));
    }
}
