//! The hub's address, the token, and whether requests are allowed. The settings are those of the hub's own programs.

use std::env;
use std::fmt;
use std::io::{self, Read as _};
use std::path::PathBuf;

use sluice_format::open_regular;
use ureq::http::Uri;

use crate::error::HubError;

/// Default address of the hub.
const HUB: &str = "https://huggingface.co";
/// Longest token file that is read.
const LONGEST_TOKEN: usize = 4096;

/// Settings of a [`Client`](crate::Client).
#[derive(Clone, Debug)]
pub struct Settings {
    /// Address of the hub, without a slash at its end.
    pub endpoint: String,
    /// The token, if there is one.
    pub token: Option<Token>,
    /// Send no requests.
    pub offline: bool,
    /// File of certificates to trust instead of those that are built in.
    pub certificates: Option<PathBuf>,
    /// Where the hub's own programs keep what they download. It is only read.
    pub cache: Option<PathBuf>,
}

/// A token. It is sent to the hub, and shown to nobody.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// The token in a text, such as the content of a file; `None` if the text cannot be a token.
    pub fn new(text: &str) -> Option<Self> {
        let text = text.trim();
        let sound = !text.is_empty() && text.len() <= LONGEST_TOKEN && text.bytes().all(|b| b.is_ascii_graphic());
        sound.then(|| Token(text.to_owned()))
    }

    pub(crate) fn header(&self) -> String {
        format!("Bearer {}", self.0)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token")
    }
}

impl Settings {
    /// The settings of the environment: `HF_ENDPOINT`; `HF_TOKEN`, or the file that `HF_TOKEN_PATH` names, or `token` in `HF_HOME`,
    /// which is `~/.cache/huggingface` by default; `HF_HUB_OFFLINE`; `HF_HUB_CACHE`, which is `hub` in `HF_HOME`; `SSL_CERT_FILE`.
    ///
    /// # Errors
    /// [`HubError::Setting`] for an invalid address or token.
    pub fn from_env() -> Result<Self, HubError> {
        Self::from(&|name| env::var(name).ok().filter(|value| !value.trim().is_empty()))
    }

    /// The settings that a lookup of variables gives.
    fn from(variable: &dyn Fn(&str) -> Option<String>) -> Result<Self, HubError> {
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| HUB.to_owned());
        let endpoint = endpoint.trim().trim_end_matches('/').to_owned();
        let host = endpoint.strip_prefix("https://").or_else(|| endpoint.strip_prefix("http://"));
        let strange = |c: char| c.is_whitespace() || matches!(c, '?' | '#' | '@');
        // The port is checked only when it is read.
        let is_host = |text: &str| text.ends_with(']') || !text.contains(':');
        let is_uri = |uri: Uri| uri.authority().is_some_and(|a| a.port().is_some() || is_host(a.as_str()));
        let is_sound = endpoint.parse().is_ok_and(is_uri) && host.is_some_and(|host| !host.starts_with('/'));
        if !is_sound || endpoint.contains(strange) {
            let problem = format!("{endpoint:?} is no address. It begins with https:// or http:// and a name");
            return Err(HubError::Setting { variable: "HF_ENDPOINT", problem });
        }
        let is_set = |name| {
            variable(name).is_some_and(|v| matches!(v.trim().to_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE"))
        };
        Ok(Settings {
            endpoint,
            token: token(variable)?,
            offline: is_set("HF_HUB_OFFLINE"),
            certificates: variable("SSL_CERT_FILE").map(PathBuf::from),
            cache: cache(variable),
        })
    }
}

/// Where the hub's own programs keep what they download.
fn cache(variable: &dyn Fn(&str) -> Option<String>) -> Option<PathBuf> {
    let said = variable("HF_HUB_CACHE").or_else(|| variable("HUGGINGFACE_HUB_CACHE"));
    said.map(|path| expanded(&path, variable)).or_else(|| Some(home(variable)?.join("hub")))
}

fn token(variable: &dyn Fn(&str) -> Option<String>) -> Result<Option<Token>, HubError> {
    for name in ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"] {
        if let Some(text) = variable(name) {
            let problem = "what it holds is no token".to_owned();
            return Token::new(&text).map(Some).ok_or(HubError::Setting { variable: name, problem });
        }
    }
    let Some(path) = token_path(variable) else { return Ok(None) };
    let wrong = |problem: String| HubError::Setting { variable: "HF_TOKEN_PATH", problem };
    let mut text = String::new();
    let read = open_regular(&path).and_then(|file| file.take(2 * LONGEST_TOKEN as u64).read_to_string(&mut text));
    match read {
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => return Ok(None),
        Err(e) => return Err(wrong(format!("{}: the token cannot be read: {e}", path.display()))),
        Ok(_) if text.trim().is_empty() => return Ok(None),
        Ok(_) => {}
    }
    let problem = format!("{} holds no token. Log in again with `hf auth login`", path.display());
    Token::new(&text).map(Some).ok_or(wrong(problem))
}

/// Where `hf auth login` leaves a token.
fn token_path(variable: &dyn Fn(&str) -> Option<String>) -> Option<PathBuf> {
    let said = variable("HF_TOKEN_PATH").map(|path| expanded(&path, variable));
    said.or_else(|| Some(home(variable)?.join("token")))
}

/// The folder of the hub's own programs.
fn home(variable: &dyn Fn(&str) -> Option<String>) -> Option<PathBuf> {
    variable("HF_HOME").map(|path| expanded(&path, variable)).or_else(|| {
        let cache = variable("XDG_CACHE_HOME").map(|path| expanded(&path, variable));
        let cache = cache.or_else(|| Some(PathBuf::from(variable("HOME")?).join(".cache")))?;
        Some(cache.join("huggingface"))
    })
}

/// A path in which `~` at the beginning is replaced by the user's folder, in case no shell has done that.
fn expanded(path: &str, variable: &dyn Fn(&str) -> Option<String>) -> PathBuf {
    let below = path.strip_prefix('~').filter(|rest| rest.is_empty() || rest.starts_with('/'));
    match (below, variable("HOME")) {
        (Some(below), Some(home)) => PathBuf::from(home + below),
        _ => path.into(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    fn settings(variables: &[(&str, &str)]) -> Result<Settings, HubError> {
        let find = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned());
        Settings::from(&find)
    }

    #[test]
    fn the_environment_is_read_as_the_hub_s_programs_read_it() {
        let none = settings(&[]).unwrap();
        assert_eq!((none.endpoint.as_str(), none.token, none.offline), (HUB, None, false));
        let s = settings(&[("HF_ENDPOINT", "http://127.0.0.1:8/"), ("HF_TOKEN", " hf_x\n"), ("HF_HUB_OFFLINE", "yes")])
            .unwrap();
        assert_eq!((s.endpoint.as_str(), s.token, s.offline), ("http://127.0.0.1:8", Token::new("hf_x"), true));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        fs::write(&path, "hf_file\n").unwrap();
        let home = folder.path().to_str().unwrap();
        for variables in [[("HF_HOME", home)], [("HF_TOKEN_PATH", path.to_str().unwrap())]] {
            assert_eq!(settings(&variables).unwrap().token, Token::new("hf_file"));
        }
        fs::create_dir_all(folder.path().join(".cache/huggingface")).unwrap();
        fs::rename(path, folder.path().join(".cache/huggingface/token")).unwrap();
        assert_eq!(settings(&[("HOME", home)]).unwrap().token, Token::new("hf_file"));
        assert_eq!(settings(&[("HOME", home), ("HF_TOKEN", "hf_env")]).unwrap().token, Token::new("hf_env"));
    }

    #[test]
    fn the_cache_is_where_the_hub_s_programs_have_it() {
        let cache = |variables: &[(&str, &str)]| settings(variables).unwrap().cache;
        let is = |path: &str| Some(Path::new(path).to_owned());
        assert_eq!(cache(&[]), None);
        assert_eq!(cache(&[("HOME", "/h")]), is("/h/.cache/huggingface/hub"));
        assert_eq!(cache(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]), is("/x/huggingface/hub"));
        assert_eq!(cache(&[("HOME", "/h"), ("HF_HOME", "~/hf")]), is("/h/hf/hub"));
        assert_eq!(cache(&[("HF_HOME", "/hf"), ("HUGGINGFACE_HUB_CACHE", "/old")]), is("/old"));
        assert_eq!(cache(&[("HF_HUB_CACHE", "/new"), ("HUGGINGFACE_HUB_CACHE", "/old")]), is("/new"));
        assert_eq!(cache(&[("HOME", "/h"), ("HF_HUB_CACHE", "~x/hub")]), is("~x/hub"));
    }

    #[test]
    fn nonsense_is_named() {
        for endpoint in [
            "huggingface.co",
            "ftp://x",
            "https://",
            "https:///x",
            "https://a b",
            "https://user@host",
            "http://a:99999",
            "http://a:b",
            "http://a/?x",
        ] {
            let error = settings(&[("HF_ENDPOINT", endpoint)]).unwrap_err().to_string();
            assert!(error.contains("HF_ENDPOINT"), "{error}");
        }
        for endpoint in ["http://[::1]:8080", "https://a.b:443/mirror/", "http://[::1]", "http://a"] {
            assert_eq!(settings(&[("HF_ENDPOINT", endpoint)]).unwrap().endpoint, endpoint.trim_end_matches('/'));
        }
        let error = settings(&[("HF_TOKEN_PATH", "/")]).unwrap_err().to_string();
        assert!(error.contains("HF_TOKEN_PATH") && error.contains("folder"), "{error}");
        let error = settings(&[("HF_TOKEN", "two words")]).unwrap_err().to_string();
        assert!(error.contains("HF_TOKEN") && !error.contains("two words"), "{error}");
        assert_eq!(format!("{:?}", Token::new("hf_secret")), "Some(Token)");
    }
}
