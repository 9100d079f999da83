//! Models in several files, as made by `llama-gguf-split`: `NAME-00001-of-00005.gguf`.

use std::path::{Path, PathBuf};

use super::container::Head;
use super::keys::ARCHITECTURE;
use super::metadata::Problem;
use crate::error::{ConvertError, first_few};

const NUMBER: &str = "split.no";
const COUNT: &str = "split.count";
const TENSORS: &str = "split.tensors.count";
/// Digits of the numbers in names.
const DIGITS: usize = 5;
/// Most parts, because each is kept open.
const MAX_PARTS: usize = 8192;

/// A name such as `NAME-00001-of-00005.gguf`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PartName<'a> {
    stem: &'a str,
    /// From 1 on.
    number: usize,
    total: usize,
}

impl<'a> PartName<'a> {
    /// The parts of a name; `None` if it has another form.
    pub(crate) fn parse(name: &'a str) -> Option<Self> {
        let (rest, total) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let (stem, number) = rest.rsplit_once('-')?;
        let count = |text: &str| {
            let digits = text.len() == DIGITS && text.bytes().all(|b| b.is_ascii_digit());
            digits.then(|| text.parse::<usize>().ok())?
        };
        let (number, total) = (count(number)?, count(total)?);
        let fits = (1..=total).contains(&number) && total <= MAX_PARTS;
        fits.then_some(PartName { stem, number, total })
    }

    /// The names of all parts, in order.
    pub(crate) fn all(&self) -> Vec<String> {
        (1..=self.total).map(|number| format!("{}-{number:05}-of-{:05}.gguf", self.stem, self.total)).collect()
    }
}

/// The files of the model to which `path` belongs, as its only file or as any part.
///
/// # Errors
/// [`ConvertError::MissingParts`].
pub(super) fn files(path: &Path) -> Result<Vec<PathBuf>, ConvertError> {
    let name = path.file_name().and_then(|name| name.to_str());
    let Some(parts) = name.and_then(PartName::parse) else { return Ok(vec![path.to_owned()]) };
    let folder = path.parent().unwrap_or(Path::new(""));
    let all: Vec<PathBuf> = parts.all().iter().map(|name| folder.join(name)).collect();
    let is_missing = |file: &&PathBuf| !file.exists();
    let missing: Vec<String> = all.iter().filter(is_missing).map(|file| name_of(file)).collect();
    if missing.is_empty() {
        return Ok(all);
    }
    Err(ConvertError::MissingParts {
        path: folder.to_owned(),
        missing: missing.len(),
        total: all.len(),
        names: first_few(&missing),
    })
}

fn name_of(file: &Path) -> String {
    file.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

/// Checks that the heads of all files, in order of their names, are the parts of one model. Older converters wrote the same keys
/// into all parts, or none into later ones.
pub(super) fn check(names: &[String], heads: &[Head]) -> Result<(), (usize, Problem)> {
    for (i, head) in heads.iter().enumerate() {
        let of_file = |problem: Problem| (i, problem);
        let count = head.metadata.uint(COUNT).map_err(of_file)?;
        match count {
            None | Some(0 | 1) if heads.len() == 1 => {}
            Some(count) if count == heads.len() as u64 => {
                let number = head.metadata.uint(NUMBER).map_err(of_file)?;
                if number.is_some_and(|n| n != i as u64) {
                    let found = number.unwrap_or_default() + 1;
                    let problem = format!("says that it is part {found}, its name that it is part {}", i + 1);
                    return Err((i, Problem::new(NUMBER, problem)));
                }
            }
            Some(count) if heads.len() == 1 => {
                let problem = format!(
                    "says that it is one of {count} parts. Name one whose name ends as `-00001-of-{count:05}.gguf`, with the \
                     others beside it"
                );
                return Err((i, Problem::new(COUNT, problem)));
            }
            found => {
                let found = found.unwrap_or(1);
                let problem =
                    format!("says that there are {found} parts, the name of {} says {}", names[i], heads.len());
                return Err((i, Problem::new(COUNT, problem)));
            }
        }
    }
    let architecture = |head: &Head| head.metadata.get(ARCHITECTURE).cloned();
    if let Some(other) = heads.iter().position(|h| architecture(h).is_some_and(|a| Some(a) != architecture(&heads[0])))
    {
        let problem = format!("differs from that of {}: these are parts of different models", names[0]);
        return Err((other, Problem::new(ARCHITECTURE, problem)));
    }
    let said = heads[0].metadata.uint(TENSORS).map_err(|problem| (0, problem))?;
    let found: usize = heads.iter().map(|head| head.tensors.len()).sum();
    match said {
        Some(said) if heads.len() > 1 && said != found as u64 => {
            Err((0, Problem::new(TENSORS, format!("is {said}, and the parts have {found} tensors"))))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_parts() {
        let part = PartName::parse("R1-Q4_K_M-00002-of-00003.gguf").unwrap();
        assert_eq!((part.stem, part.number, part.total), ("R1-Q4_K_M", 2, 3));
        assert_eq!(part.all()[2], "R1-Q4_K_M-00003-of-00003.gguf");
        for other in
            ["a.gguf", "a-1-of-3.gguf", "a-00004-of-00003.gguf", "a-00000-of-00003.gguf", "a-00001-of-99999.gguf"]
        {
            assert_eq!(PartName::parse(other), None, "{other}");
        }
    }
}
