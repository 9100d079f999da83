//! Chooses the files of a repository that make the model.

use std::collections::{BTreeMap, BTreeSet};

use sluice_converter::pattern::Pattern;

use crate::error::HubError;
use crate::name::Reference;
use crate::snapshot::{RemoteFile, Snapshot};

/// Files of weights that this program does not read, or that repeat the content of safetensors files.
const OTHER_WEIGHTS: [&str; 14] = [
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.onnx_data",
    "*.gguf",
    "*.tflite",
    "*.ot",
    "*.mlmodel",
    "*.npz",
    "original/*",
];
/// Most models that a message lists.
const LISTED: usize = 40;

/// What a repository's weights are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Safetensors, with `config.json` beside them.
    Safetensors,
    /// GGUF files.
    Gguf,
}

/// Chooses safetensors, unless the user names a GGUF file or the repository has no safetensors.
///
/// # Errors
/// [`HubError::Selection`] if there are no readable weights.
pub fn form(snapshot: &Snapshot, reference: &Reference) -> Result<Form, HubError> {
    let has = |ending: &str| snapshot.files.iter().any(|file| file.path.ends_with(ending));
    let at_top = |file: &RemoteFile| file.path.ends_with(".safetensors") && !file.path.contains('/');
    match (snapshot.files.iter().any(at_top), has(".gguf")) {
        (true, true) if reference.part.is_some() => Ok(Form::Gguf),
        (true, _) => match &reference.part {
            None => Ok(Form::Safetensors),
            Some(part) => Err(selection(
                snapshot,
                format!("`:{part}` names one of several GGUF files, and there are none. Leave it out"),
            )),
        },
        (false, true) => Ok(Form::Gguf),
        (false, false) => Err(selection(snapshot, what_else(snapshot))),
    }
}

/// What a repository has instead of readable weights, and what to do.
fn what_else(snapshot: &Snapshot) -> String {
    let pickled = patterns(&["*.bin", "*.pt", "*.pth"]);
    if let Some(below) = snapshot.files.iter().find(|file| file.path.ends_with(".safetensors")) {
        let (path, repo) = (&below.path, &snapshot.repo);
        let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
        return format!(
            "its safetensors files are in folders, such as `{path}`, and a checkpoint is at the top of a repository. If that folder \
             is one, take it: `sluice pull {repo} --include '{folder}/*'`, then `sluice convert` of the folder that this makes"
        );
    }
    let (found, advice) = match snapshot.files.iter().any(|file| pickled.iter().any(|p| p.matches(&file.path))) {
        true => (
            "only weights as PyTorch pickles them",
            "Look for a repository of the same model with safetensors or GGUF files",
        ),
        false => ("no weights", "Check its name"),
    };
    format!("there are no safetensors or GGUF files, {found}. {advice}")
}

fn patterns<S: AsRef<str>>(texts: &[S]) -> Vec<Pattern> {
    texts.iter().map(|text| Pattern::of_files(text.as_ref())).collect()
}

/// The GGUF files of the chosen model; those of a split model in their order.
///
/// # Errors
/// [`HubError::Selection`] if no model or several models match; it lists the models of the repository.
pub fn gguf_files<'s>(snapshot: &'s Snapshot, part: Option<&str>) -> Result<Vec<&'s RemoteFile>, HubError> {
    let is_model = |file: &&RemoteFile| {
        let name = base_name(&file.path).to_lowercase();
        name.ends_with(".gguf") && !name.contains("mmproj") && !name.contains("imatrix")
    };
    let mut models: BTreeMap<String, Vec<&RemoteFile>> = BTreeMap::new();
    for file in snapshot.files.iter().filter(is_model) {
        models.entry(without_split(&file.path)).or_default().push(file);
    }
    let mut chosen: Vec<&String> = match part {
        None => models.keys().collect(),
        Some(part) => named(&models, part),
    };
    // Unsloth's dynamic quantisations stand beside plain ones of the same name.
    if let Some(part) = part.filter(|part| chosen.len() > 1 && !part.to_uppercase().contains("UD-")) {
        let plain: Vec<&String> = chosen
            .iter()
            .filter(|key| !key.to_uppercase().contains(&format!("UD-{}", part.to_uppercase())))
            .copied()
            .collect();
        if plain.len() == 1 {
            chosen = plain;
        }
    }
    if let [one] = chosen[..] {
        return Ok(models[one].clone());
    }
    let listed: Vec<&String> = if chosen.is_empty() { models.keys().collect() } else { chosen.clone() };
    let line = |key: &&String| {
        let size: u64 = models[*key].iter().map(|file| file.size).sum();
        format!("\n  {:>8.1} GB  {key}", size as f64 / 1e9)
    };
    let lines: String = listed.iter().take(LISTED).map(line).collect();
    let more = listed.len().saturating_sub(LISTED);
    let more = if more > 0 { format!("\n  and {more} more") } else { String::new() };
    let said = match (part, chosen.is_empty()) {
        (Some(part), true) => format!("no model in it is called `{part}`"),
        _ => "several models are in it".into(),
    };
    let problem =
        format!("{said}. Say which, as hf:{}:QUANT or hf:{}:FILE.gguf, of{lines}{more}", snapshot.repo, snapshot.repo);
    Err(selection(snapshot, problem))
}

/// Models that match a file's path, its name, or the name of a quantisation.
fn named<'m>(models: &'m BTreeMap<String, Vec<&RemoteFile>>, part: &str) -> Vec<&'m String> {
    let exact =
        |(_, files): &(&String, &Vec<&RemoteFile>)| files.iter().any(|f| f.path == part || base_name(&f.path) == part);
    let found: Vec<&String> = models.iter().filter(exact).map(|(key, _)| key).collect();
    if !found.is_empty() {
        return found;
    }
    models.keys().filter(|key| has_word(key, part)).collect()
}

/// Whether a path contains a whole word, in upper or lower case.
fn has_word(path: &str, word: &str) -> bool {
    let (path, word) = (path.to_lowercase(), word.to_lowercase());
    let is_end = |c: Option<char>| c.is_none_or(|c| !c.is_alphanumeric() && c != '_');
    path.match_indices(&word)
        .any(|(at, found)| is_end(path[..at].chars().next_back()) && is_end(path[at + found.len()..].chars().next()))
}

/// The last segment of a path.
pub(crate) fn base_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// A path without the `-00001-of-00005` of a split.
fn without_split(path: &str) -> String {
    let split = || {
        let (rest, total) = path.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let (stem, number) = rest.rsplit_once('-')?;
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        (digits(number) && digits(total)).then(|| format!("{stem}.gguf"))
    };
    split().unwrap_or_else(|| path.to_owned())
}

/// Files that a download takes.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Patterns of which one must match. Without patterns: the files that a conversion needs, and those that describe
    /// the model.
    pub include: Vec<String>,
    /// Patterns of which none may match.
    pub exclude: Vec<String>,
}

/// The files to download, and those that are left out because safetensors or the named model makes them useless.
///
/// # Errors
/// [`HubError::Selection`] if there are none, or if it is not clear which are meant.
pub fn to_pull<'s>(
    snapshot: &'s Snapshot,
    reference: &Reference,
    filter: &Filter,
) -> Result<(Vec<&'s RemoteFile>, Vec<&'s RemoteFile>), HubError> {
    let any = |patterns: &[Pattern], file: &RemoteFile| patterns.iter().any(|p| p.matches(&file.path));
    let (include, exclude) = (patterns(&filter.include), patterns(&filter.exclude));
    let mut wanted: Box<dyn Fn(&RemoteFile) -> bool> = Box::new(|file| any(&include, file));
    if include.is_empty() {
        let other = patterns(&OTHER_WEIGHTS);
        wanted = match form(snapshot, reference) {
            Ok(Form::Gguf) => {
                let weights = gguf_files(snapshot, reference.part.as_deref())?;
                let paths: BTreeSet<&str> = weights.iter().map(|file| file.path.as_str()).collect();
                Box::new(move |file| {
                    let is_weights = any(&other, file) || file.path.ends_with(".safetensors");
                    !is_weights || paths.contains(file.path.as_str())
                })
            }
            Ok(Form::Safetensors) => Box::new(move |file| !any(&other, file)),
            // A user who asks for a repository without a model gets it.
            Err(_) if reference.part.is_none() => Box::new(|_| true),
            Err(e) => return Err(e),
        };
    }
    let not_excluded = snapshot.files.iter().filter(|file| !any(&exclude, file));
    let (taken, left): (Vec<_>, Vec<_>) = not_excluded.partition(|file| wanted(file));
    if taken.is_empty() {
        return Err(selection(snapshot, "none of its files is wanted. Check --include and --exclude".into()));
    }
    Ok((taken, if include.is_empty() { left } else { Vec::new() }))
}

fn selection(snapshot: &Snapshot, problem: String) -> HubError {
    HubError::Selection { repo: snapshot.repo.clone(), problem }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;

    fn snapshot(paths: &[&str]) -> Snapshot {
        let mut files: Vec<RemoteFile> = paths
            .iter()
            .map(|path| RemoteFile { path: (*path).into(), size: 1, digest: Digest::Git([0; 20]) })
            .collect();
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Snapshot { repo: "a/b".into(), commit: "0".repeat(40), files, cached: None }
    }

    fn names(files: &[&RemoteFile]) -> Vec<String> {
        files.iter().map(|file| file.path.clone()).collect()
    }

    fn reference(text: &str) -> Reference {
        text.parse().unwrap()
    }

    #[test]
    fn a_quantisation_names_its_files() {
        let s = snapshot(&[
            "m-Q4_K_M.gguf",
            "m-UD-Q4_K_M.gguf",
            "m-Q4_K_S.gguf",
            "IQ2_XS/m-IQ2_XS-00001-of-00002.gguf",
            "IQ2_XS/m-IQ2_XS-00002-of-00002.gguf",
            "mmproj-F16.gguf",
            "README.md",
            "m-BF16.gguf",
        ]);
        let of = |part: &str| gguf_files(&s, Some(part)).map(|files| names(&files));
        assert_eq!(of("Q4_K_M").unwrap(), ["m-Q4_K_M.gguf"]);
        assert_eq!(of("q4_k_s").unwrap(), ["m-Q4_K_S.gguf"]);
        assert_eq!(of("UD-Q4_K_M").unwrap(), ["m-UD-Q4_K_M.gguf"]);
        let split = ["IQ2_XS/m-IQ2_XS-00001-of-00002.gguf", "IQ2_XS/m-IQ2_XS-00002-of-00002.gguf"];
        assert_eq!(of("IQ2_XS").unwrap(), split);
        assert_eq!(of("m-IQ2_XS-00001-of-00002.gguf").unwrap(), split);
        assert_eq!(of("F16").unwrap_err().to_string().matches(".gguf").count(), 6);
        let error = gguf_files(&s, None).unwrap_err().to_string();
        assert!(
            error.contains("several models") && error.contains("m-BF16.gguf") && !error.contains("mmproj"),
            "{error}"
        );
        assert_eq!(
            names(&to_pull(&s, &reference("a/b:BF16"), &Filter::default()).unwrap().0),
            ["README.md", "m-BF16.gguf"]
        );
    }

    #[test]
    fn a_download_takes_what_a_conversion_needs() {
        let all = [
            "config.json",
            "model-00001-of-00001.safetensors",
            "model.safetensors.index.json",
            "original/params.json",
            "pytorch_model.bin",
            "tokenizer.json",
            "README.md",
        ];
        let s = snapshot(&all);
        let (taken, left) = to_pull(&s, &reference("a/b"), &Filter::default()).unwrap();
        assert_eq!(names(&left), ["original/params.json", "pytorch_model.bin"]);
        assert_eq!(taken.len() + left.len(), all.len());
        let filter = Filter { include: vec!["*.json".into()], exclude: vec!["original/*".into()] };
        let (taken, left) = to_pull(&s, &reference("a/b"), &filter).unwrap();
        assert_eq!(
            (names(&taken), left.len()),
            (vec!["config.json".into(), "model.safetensors.index.json".into(), "tokenizer.json".into()], 0)
        );
        let nothing = Filter { include: vec!["x".into()], exclude: Vec::new() };
        assert!(to_pull(&s, &reference("a/b"), &nothing).is_err());
        assert_eq!(to_pull(&snapshot(&["README.md"]), &reference("a/b"), &Filter::default()).unwrap().0.len(), 1);
    }

    #[test]
    fn the_form_is_told() {
        assert_eq!(form(&snapshot(&["model.safetensors", "m.gguf"]), &reference("a/b")).unwrap(), Form::Safetensors);
        assert_eq!(form(&snapshot(&["model.safetensors", "m.gguf"]), &reference("a/b:m.gguf")).unwrap(), Form::Gguf);
        assert_eq!(form(&snapshot(&["x/m.gguf"]), &reference("a/b")).unwrap(), Form::Gguf);
        assert!(form(&snapshot(&["model.safetensors"]), &reference("a/b:Q4_0")).is_err());
        let error = form(&snapshot(&["pytorch_model.bin"]), &reference("a/b")).unwrap_err().to_string();
        assert!(error.contains("PyTorch"), "{error}");
        let error = form(&snapshot(&["fp16/model.safetensors"]), &reference("a/b")).unwrap_err().to_string();
        assert!(error.contains("--include 'fp16/*'"), "{error}");
    }
}
