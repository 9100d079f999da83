//! Recognises files and folders of other kinds than requested, and says what to do about each.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use sluice_format::{MAGIC, open_regular};

use super::{CONFIG, INDEX, SINGLE};
use crate::error::{ConvertError, OF_REPOSITORY, first_few, is_of_hub};

/// Bytes that identify the kind of a file.
const HEAD: u64 = 256;
/// Entries of a folder that are inspected to recognise it.
const MAX_ENTRIES: usize = 10_000;

/// A file that is not part of a checkpoint, recognised by its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Foreign {
    LfsPointer,
    Gguf,
    ModelFile,
    Pickle,
    WebPage,
}

impl Foreign {
    /// Recognises a file by its first bytes.
    pub(crate) fn of_bytes(bytes: &[u8]) -> Option<Self> {
        let text = bytes.trim_ascii_start();
        let page = [&b"<!doctype html"[..], b"<html"];
        // https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
        if bytes.starts_with(b"version https://git-lfs.github.com/spec/") {
            Some(Foreign::LfsPointer)
        } else if bytes.starts_with(b"GGUF") {
            Some(Foreign::Gguf)
        } else if bytes.starts_with(&MAGIC) {
            Some(Foreign::ModelFile)
        } else if bytes.starts_with(b"PK\x03\x04") || bytes.starts_with(b"\x80\x02") {
            Some(Foreign::Pickle)
        } else if page.iter().any(|p| text.len() >= p.len() && text[..p.len()].eq_ignore_ascii_case(p)) {
            Some(Foreign::WebPage)
        } else {
            None
        }
    }

    /// Recognises the file at `path`; `None` also if it cannot be read.
    fn of_file(path: &Path) -> Option<Self> {
        Self::of_bytes(&head(path)?)
    }

    /// The error that the file at `path` is of this kind.
    pub(crate) fn error(self, path: &Path) -> ConvertError {
        let (what, advice) = match self {
            Foreign::LfsPointer => (
                "a Git LFS pointer, the placeholder of a file that has not been downloaded",
                "Run `git lfs pull` in its folder, or download the model with `hf download`",
            ),
            Foreign::Gguf => (
                "a GGUF file, as llama.cpp has them",
                "Convert it, with `sluice convert`, and name the file that this makes",
            ),
            Foreign::ModelFile => (
                "a model file of this program already",
                "Use it as it is, for example with `sluice run`; to change its types, convert the checkpoint again",
            ),
            Foreign::Pickle => (
                "a PyTorch file, or another archive, which is not read: it can hold programs",
                "Take a release with safetensors files, or load it with transformers and `save_pretrained` it",
            ),
            Foreign::WebPage => (
                "a web page, not what it is named after",
                "Download it again with `hf download`; some models want `hf auth login` first",
            ),
        };
        let is_download = matches!(self, Foreign::LfsPointer | Foreign::WebPage);
        let advice = if is_download && is_of_hub(path) { OF_REPOSITORY } else { advice };
        ConvertError::Foreign { path: path.to_owned(), what, advice }
    }
}

/// Whether the file at `path` is a GGUF file, by its first bytes.
pub(crate) fn is_gguf(path: &Path) -> bool {
    path.is_file() && Foreign::of_file(path) == Some(Foreign::Gguf)
}

fn head(path: &Path) -> Option<Vec<u8>> {
    let mut head = Vec::new();
    open_regular(path).ok()?.take(HEAD).read_to_end(&mut head).ok()?;
    Some(head)
}

/// Refuses files of the folder that are Git LFS pointers, and counts them.
pub(crate) fn refuse_pointers(dir: &Path, files: &[String]) -> Result<(), ConvertError> {
    let is_pointer = |name: &&String| Foreign::of_file(&dir.join(name)) == Some(Foreign::LfsPointer);
    let pointers: Vec<String> = files.iter().filter(is_pointer).cloned().collect();
    match pointers.first() {
        None => Ok(()),
        Some(only) if files.len() == 1 => Err(Foreign::LfsPointer.error(&dir.join(only))),
        Some(_) => Err(ConvertError::Pointers {
            path: dir.to_owned(),
            count: pointers.len(),
            total: files.len(),
            names: pointers,
        }),
    }
}

/// The error that `path`, which is not a folder, is not a checkpoint, and what it is instead.
pub(crate) fn no_folder(path: &Path) -> ConvertError {
    let no_checkpoint = |problem: String| ConvertError::NotACheckpoint { path: path.to_owned(), problem };
    if !path.exists() {
        return no_checkpoint(nothing_there(path));
    }
    if let Some(foreign) = Foreign::of_file(path) {
        return foreign.error(path);
    }
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let of_checkpoint = path.extension().is_some_and(|e| e == "safetensors" || e == "json");
    no_checkpoint(if is_named_gguf(path) {
        "it does not begin as GGUF files do. Download it again".to_owned()
    } else if of_checkpoint {
        format!("it is a file. Name the folder that holds it, {}", parent.display())
    } else {
        "it is not a folder. Name the folder that holds `config.json`".to_owned()
    })
}

/// The error that the file at `path` is something that this program does not use as a model; `None` if it may be one.
pub fn no_model(path: &Path) -> Option<ConvertError> {
    if path.is_file() && path.extension().is_some_and(|e| e == "safetensors") {
        return Some(no_folder(path));
    }
    Foreign::of_file(path).filter(|foreign| *foreign != Foreign::ModelFile).map(|foreign| foreign.error(path))
}

/// The message about a path that does not exist.
pub(crate) fn nothing_there(path: &Path) -> String {
    if path.symlink_metadata().is_ok() {
        return "it is a link to something that is not there".to_owned();
    }
    let what = if is_named_gguf(path) { "file" } else { "folder" };
    on_hub(path, None).unwrap_or_else(|| format!("there is no such {what}"))
}

/// Whether the name is that of a GGUF file.
fn is_named_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|end| end.eq_ignore_ascii_case("gguf"))
}

/// The message about a path that is a name on the hub: how to use it as such, or how to download one file of the model.
pub(crate) fn on_hub(path: &Path, file: Option<&str>) -> Option<String> {
    let name = hub_name(path)?;
    let folder = name.rsplit('/').next().unwrap_or(&name);
    let advice = match file {
        Some(file) => format!(
            "Download its `{file}` first, with `sluice pull {name} --include {file} --to {folder}`, then name the folder {folder}"
        ),
        None => format!("Name it `hf:{name}` to convert it from there"),
    };
    Some(format!("there is no such folder here, but it looks like a name on the Hugging Face Hub. {advice}"))
}

/// `path` as the name of a model on the hub, such as `deepseek-ai/DeepSeek-R1`, also taken from an address.
fn hub_name(path: &Path) -> Option<String> {
    let text = path.to_str()?.trim_end_matches('/');
    let scheme =
        text.strip_prefix("https:/").or_else(|| text.strip_prefix("http:/")).map(|t| t.trim_start_matches('/'));
    let hosted = scheme.unwrap_or(text);
    let on_hub = ["huggingface.co/", "hf.co/", "hf://"].iter().find_map(|host| hosted.strip_prefix(host));
    let name = match (on_hub, scheme) {
        // The name may be followed by `tree/main` and the like.
        (Some(name), _) => name.splitn(3, '/').take(2).collect::<Vec<_>>().join("/"),
        (None, Some(_)) => return None,
        (None, None) => text.to_owned(),
    };
    let (owner, model) = name.split_once('/')?;
    let plain = |part: &str| {
        let of_name = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        part.starts_with(|c: char| c.is_ascii_alphanumeric()) && part.chars().all(of_name)
    };
    let local = on_hub.is_none() && Path::new(owner).is_dir();
    let file = [".json", ".safetensors", ".gguf", ".sluice", ".bin"].iter().any(|end| model.ends_with(end));
    (plain(owner) && plain(model) && !local && !file).then_some(name)
}

/// The first names in a folder, up to a limit, sorted.
pub(crate) fn entries(dir: &Path) -> Vec<String> {
    let Ok(found) = fs::read_dir(dir) else { return Vec::new() };
    let names = found.take(MAX_ENTRIES).filter_map(|e| e.ok()?.file_name().into_string().ok());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

/// What a folder without `config.json` is.
pub(crate) fn no_config(dir: &Path) -> String {
    let names = entries(dir);
    // The hub's cache: models--OWNER--NAME/snapshots/REVISION.
    let mut inside: Vec<PathBuf> = names.iter().map(|n| dir.join(n)).collect();
    inside.extend(entries(&dir.join("snapshots")).iter().map(|n| dir.join("snapshots").join(n)));
    match inside.iter().find(|folder| folder.join(CONFIG).exists()) {
        Some(folder) => format!("it has no `{CONFIG}`, but the folder {} inside has one. Name that", folder.display()),
        None if names.iter().any(|n| n.ends_with(".gguf")) => gguf_folder(),
        None => format!("it has no `{CONFIG}`{}", unfinished(dir)),
    }
}

/// What a folder is whose safetensors files do not form a model.
pub(crate) fn no_weights(dir: &Path, names: &[String]) -> String {
    let has = |test: &dyn Fn(&str) -> bool| names.iter().any(|n| test(n));
    let ends = |end: &'static str| move |n: &str| n.ends_with(end);
    if has(&|n| n.starts_with("adapter_model.")) {
        return "it holds an adapter (LoRA), not a model. Merge it into its base model, with `merge_and_unload` of peft, and \
                save that"
            .to_owned();
    }
    if has(&|n| n.starts_with("pytorch_model") && n.contains(".bin")) || has(&ends(".pth")) || has(&ends(".pt")) {
        return "it holds PyTorch files, which are not read, because they can hold programs, and no safetensors. Take a \
                release with safetensors, or load it with transformers and `save_pretrained` it"
            .to_owned();
    }
    if has(&ends(".gguf")) {
        return gguf_folder();
    }
    let others: Vec<String> = names.iter().filter(|n| n.ends_with(".safetensors")).cloned().collect();
    let found = match others.as_slice() {
        [] => String::new(),
        names => format!(", only {}", first_few(names)),
    };
    format!("it has neither `{SINGLE}` nor `{INDEX}`{found}{}", unfinished(dir))
}

fn gguf_folder() -> String {
    "it holds GGUF files, as llama.cpp has them. Name one of them: of a model in several parts, any".to_owned()
}

/// What unfinished downloads of `hf download` or other programs have left, as the end of a sentence.
pub(crate) fn unfinished(dir: &Path) -> String {
    const ENDS: [&str; 4] = [".incomplete", ".part", ".aria2", ".crdownload"];
    const CACHE: &str = ".cache/huggingface/download";
    let under_way = |name: &String| ENDS.iter().any(|end| name.ends_with(end));
    let of_cache = entries(&dir.join(CACHE)).into_iter().filter(under_way).map(|name| format!("{CACHE}/{name}"));
    let left: Vec<String> = entries(dir).into_iter().filter(under_way).chain(of_cache).collect();
    match left.as_slice() {
        [] => String::new(),
        names => format!(". Downloads that have not ended: {}, {}", names.len(), first_few(names)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_on_the_hub() {
        let name = |text: &str| hub_name(Path::new(text));
        for (text, found) in [
            ("deepseek-ai/DeepSeek-R1", "deepseek-ai/DeepSeek-R1"),
            ("Qwen/Qwen3-30B-A3B/", "Qwen/Qwen3-30B-A3B"),
            ("https://huggingface.co/openai/gpt-oss-20b", "openai/gpt-oss-20b"),
            ("https://huggingface.co/openai/gpt-oss-20b/tree/main", "openai/gpt-oss-20b"),
            ("hf.co/zai-org/GLM-4.6", "zai-org/GLM-4.6"),
            ("hf://zai-org/GLM-4.6", "zai-org/GLM-4.6"),
        ] {
            assert_eq!(name(text).as_deref(), Some(found), "{text}");
        }
        // This is the folder `src`.
        for text in ["r1", "/data/r1", "./a/b", "../b", "a/b/c", "a/$b", "src/r1", "a/m.gguf", "https://a.b/c/d"] {
            assert_eq!(name(text), None, "{text}");
        }
    }

    #[test]
    fn files_by_their_first_bytes() {
        for (bytes, kind) in [
            (&b"version https://git-lfs.github.com/spec/v1\noid sha256:00"[..], Some(Foreign::LfsPointer)),
            (b"GGUF\x03\0\0\0", Some(Foreign::Gguf)),
            (&MAGIC, Some(Foreign::ModelFile)),
            (b"PK\x03\x04archive", Some(Foreign::Pickle)),
            (b"\n<!DOCTYPE html><html>", Some(Foreign::WebPage)),
            (b"{\"version\": 1}", None),
            (b"\x10\0\0\0\0\0\0\0{}", None),
            (b"", None),
        ] {
            assert_eq!(Foreign::of_bytes(bytes), kind, "{bytes:?}");
        }
    }
}
