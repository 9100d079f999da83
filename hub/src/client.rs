//! Requests to the hub. They are tried again if that can help, and the token never goes to another server.

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::io::Read as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use ureq::Agent;
use ureq::http::{HeaderMap, StatusCode};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};

use crate::digest::Digest;
use crate::error::HubError;
use crate::headers::{asked_pause, content_range, next_page, number, origin, redirected, text};
use crate::paced::Paced;
use crate::settings::Settings;

/// Most redirects of one request: the hub needs two, one for a repository that was renamed, and one to the server with
/// the bytes.
const REDIRECTS: usize = 5;
/// Longest answer of the interface that is read, such as a page of a listing.
const LONGEST_ANSWER: u64 = 64 << 20;
/// Shortest pause about which the user is told.
const LONG_PAUSE: Duration = Duration::from_secs(5);

/// How patiently a request is tried.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Most attempts in a row that bring no byte.
    pub attempts: u32,
    /// Pause after the first failure; it doubles with each.
    pub first_pause: Duration,
    /// The longest pause that the client chooses itself.
    pub longest_pause: Duration,
    /// The longest pause that the hub may ask for.
    pub longest_wait: Duration,
    /// Time limit to connect.
    pub connect: Duration,
    /// Time limit for an answer to begin, and for its next bytes.
    pub silence: Duration,
    /// Fewest bytes that must come within `silence`, and that an attempt must bring to count as a success.
    pub slowest: u64,
}

impl Default for Patience {
    fn default() -> Self {
        Patience {
            attempts: 8,
            first_pause: Duration::from_millis(250),
            longest_pause: Duration::from_secs(30),
            longest_wait: Duration::from_secs(15 * 60),
            connect: Duration::from_secs(15),
            silence: Duration::from_secs(30),
            slowest: 8 << 10,
        }
    }
}

/// Learns of pauses that the hub asks for, and of what is read from the cache because requests are forbidden.
pub type Notice = Arc<dyn Fn(&str) + Send + Sync>;

/// Sends requests to the hub. Threads share a client; it keeps connections open.
pub struct Client {
    agent: Agent,
    settings: Settings,
    patience: Patience,
    notice: Option<Notice>,
    /// The addresses to which files are redirected, while those are valid.
    places: Mutex<HashMap<String, String>>,
    /// No request is sent before this time, because the hub wants fewer requests.
    not_before: Mutex<Option<Instant>>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("settings", &self.settings).finish_non_exhaustive()
    }
}

/// What the hub's own answers say about a file, before they redirect to its bytes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Linked {
    pub(crate) commit: Option<String>,
    pub(crate) digest: Option<Digest>,
    pub(crate) size: Option<u64>,
}

/// Why a request failed.
enum Trouble {
    /// The request would fail again.
    Final(HubError),
    /// It may succeed later.
    Passing { problem: String, pause: Option<Duration>, busy: bool },
}

impl Trouble {
    fn passing(problem: impl Into<String>) -> Self {
        Trouble::Passing { problem: problem.into(), pause: None, busy: false }
    }
}

/// An answer with the status of success.
struct Reply {
    body: ureq::Body,
    status: StatusCode,
    headers: HeaderMap,
    linked: Linked,
}

/// What is requested, for messages and errors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Question<'a> {
    pub(crate) repo: &'a str,
    /// A sentence's subject, such as "the file `x`".
    pub(crate) what: &'a str,
}

/// A file of a repository at a commit, as a request names it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted<'a> {
    pub(crate) url: &'a str,
    pub(crate) repo: &'a str,
    /// Its path in the repository.
    pub(crate) file: &'a str,
    pub(crate) size: u64,
    pub(crate) digest: Digest,
}

/// How long one request has been tried.
struct Attempts<'c> {
    client: &'c Client,
    url: String,
    failed: u32,
    waited: Duration,
    /// Bytes since the last success.
    came: u64,
}

/// Takes bytes of a file with their place in it.
type Sink<'s> = dyn FnMut(u64, &[u8]) -> Result<(), HubError> + 's;

impl Client {
    /// A client with these settings.
    ///
    /// # Errors
    /// [`HubError::Setting`] if the certificates cannot be read.
    pub fn new(settings: Settings) -> Result<Self, HubError> {
        Self::with_patience(settings, Patience::default(), None)
    }

    /// A client with the given patience, which says when it has to wait.
    ///
    /// # Errors
    /// As [`Client::new`].
    pub fn with_patience(settings: Settings, patience: Patience, notice: Option<Notice>) -> Result<Self, HubError> {
        let mut tls = TlsConfig::builder();
        if let Some(path) = &settings.certificates {
            let wrong = |problem: String| HubError::Setting { variable: "SSL_CERT_FILE", problem };
            let pem = fs::read(path).map_err(|e| wrong(format!("{} cannot be read: {e}", path.display())))?;
            let certificates = parse_pem(&pem).filter_map(|item| match item {
                Ok(PemItem::Certificate(certificate)) => Some(certificate),
                _ => None,
            });
            let certificates: Vec<Certificate<'static>> = certificates.collect();
            if certificates.is_empty() {
                return Err(wrong(format!("{} holds no certificates", path.display())));
            }
            tls = tls.root_certs(RootCerts::new_with_certs(&certificates));
        }
        let config = Agent::config_builder()
            .http_status_as_error(false)
            // Redirects are followed here, because this code knows which server may have the token.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("sluice/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .timeout_connect(Some(patience.connect))
            .timeout_recv_response(Some(patience.silence))
            .timeout_per_read(Some(patience.silence))
            .max_idle_connections_per_host(64)
            .max_idle_connections(64)
            .tls_config(tls.build())
            .build();
        let (places, not_before) = (Mutex::default(), Mutex::default());
        Ok(Client { agent: config.new_agent(), settings, patience, notice, places, not_before })
    }

    /// The settings with which it was made.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Tells the user something.
    pub(crate) fn say(&self, text: &str) {
        self.notice.iter().for_each(|notice| notice(text));
    }

    /// The address of a repository's page.
    pub(crate) fn page(&self, repo: &str) -> String {
        format!("{}/{repo}", self.settings.endpoint)
    }

    /// Requests a JSON document from the interface; returns it with the address of the next page, if there is one.
    pub(crate) fn json(
        &self,
        url: &str,
        question: Question<'_>,
    ) -> Result<(serde_json::Value, Option<String>), HubError> {
        let mut attempts = self.attempts(url, question)?;
        loop {
            let outcome = self.ask("GET", url, question, None).and_then(|mut reply| {
                let next = next_page(&reply.headers);
                let mut bytes = Vec::new();
                let read = self.paced(&mut reply.body).take(LONGEST_ANSWER + 1).read_to_end(&mut bytes);
                read.map_err(|e| Trouble::passing(format!("its answer breaks off ({e})")))?;
                if bytes.len() as u64 > LONGEST_ANSWER {
                    let problem = format!("its answer has more than {LONGEST_ANSWER} bytes");
                    return Err(Trouble::Final(HubError::Protocol { url: url.to_owned(), problem }));
                }
                let value = serde_json::from_slice(&bytes);
                // An answer that something on the way has cut off may be whole the next time.
                Ok((value.map_err(|e| Trouble::passing(format!("its answer is no JSON ({e})")))?, next))
            });
            match outcome {
                Ok(found) => return Ok(found),
                Err(trouble) => attempts.failed(trouble)?,
            }
        }
    }

    /// Requests what the hub says about a file: with `HEAD`, or if a server knows only `GET`, by reading the first
    /// byte.
    pub(crate) fn head(&self, url: &str, question: Question<'_>) -> Result<Linked, HubError> {
        let mut attempts = self.attempts(url, question)?;
        let (mut method, mut range) = ("HEAD", None);
        loop {
            match self.ask(method, url, question, range) {
                Ok(reply) => {
                    let total = text(&reply.headers, "content-range").and_then(|v| content_range(v)?.2);
                    let length = total.or_else(|| number(&reply.headers, "content-length"));
                    return Ok(Linked { size: reply.linked.size.or(length), ..reply.linked });
                }
                Err(Trouble::Final(HubError::Absent { .. } | HubError::Protocol { .. })) if method == "HEAD" => {
                    (method, range) = ("GET", Some((0, 1)));
                }
                Err(trouble) => attempts.failed(trouble)?,
            }
        }
    }

    /// Reads `len` bytes of a file from byte `at` on and passes them to `sink` in order, each once, with its place. If the line
    /// breaks, the bytes so far are kept and not requested again.
    ///
    /// # Errors
    /// The errors of the requests, and those of `sink`.
    pub(crate) fn read(&self, wanted: Wanted<'_>, at: u64, len: u64, sink: &mut Sink<'_>) -> Result<(), HubError> {
        let what = format!("the file `{}` of {}", wanted.file, wanted.repo);
        let mut attempts = self.attempts(wanted.url, Question { repo: wanted.repo, what: &what })?;
        let (mut next, end) = (at, at + len);
        let mut buffer = vec![0; 64 << 10];
        while next < end {
            let before = next;
            let outcome = self.read_once(wanted, &what, (&mut next, end), &mut buffer, sink);
            attempts.progressed(next - before);
            if let Err(trouble) = outcome {
                // Another host may be able to serve the bytes.
                lock(&self.places).remove(wanted.url);
                attempts.failed(trouble)?;
            }
        }
        Ok(())
    }

    /// One request of [`Client::read`]; advances the place past all bytes that were passed on.
    fn read_once(
        &self,
        wanted: Wanted<'_>,
        what: &str,
        (next, end): (&mut u64, u64),
        buffer: &mut [u8],
        sink: &mut Sink<'_>,
    ) -> Result<(), Trouble> {
        let question = Question { repo: wanted.repo, what };
        let mut reply = self.ask("GET", wanted.url, question, Some((*next, end)))?;
        let wrong = |problem: String| Trouble::passing(format!("for `{}` {problem}", wanted.file));
        if let Some(digest) = reply.linked.digest.filter(|d| comparable(d, &wanted.digest) && *d != wanted.digest) {
            return Err(wrong(format!("it has another content than it said before ({digest})")));
        }
        let whole = *next == 0 && end == wanted.size;
        let length = number(&reply.headers, "content-length");
        let expected = if reply.status == StatusCode::PARTIAL_CONTENT {
            let range = text(&reply.headers, "content-range").and_then(content_range);
            let Some((first, last, total)) = range else {
                return Err(wrong("it sends bytes and does not say which".into()));
            };
            if total.is_some_and(|total| total != wanted.size) {
                let total = total.unwrap_or_default();
                return Err(wrong(format!("it states a length of {total}, and before of {}", wanted.size)));
            }
            if first != *next || last >= end || last < first {
                return Err(wrong(format!(
                    "it sends bytes {first} to {last} where {} to {} were asked for",
                    *next,
                    end - 1
                )));
            }
            last + 1 - first
        } else if whole || *next == 0 {
            // A server without ranges sends everything, and the beginning may be enough.
            if length.is_some_and(|length| length != wanted.size) {
                let length = length.unwrap_or_default();
                return Err(wrong(format!("it states a length of {length}, and before of {}", wanted.size)));
            }
            end
        } else {
            return Err(wrong("it sends the whole file where a part was asked for".into()));
        };
        if reply.status == StatusCode::PARTIAL_CONTENT && length.is_some_and(|length| length != expected) {
            return Err(wrong(format!("it states two lengths, {expected} and {}", length.unwrap_or_default())));
        }
        let mut left = expected;
        let mut reader = self.paced(&mut reply.body);
        while left > 0 {
            let most = (left.min(buffer.len() as u64)) as usize;
            let count = reader.read(&mut buffer[..most]).map_err(|e| wrong(format!("the line breaks ({e})")))?;
            if count == 0 {
                return Err(wrong(format!("{left} bytes are missing of what it sends")));
            }
            sink(*next, &buffer[..count]).map_err(Trouble::Final)?;
            *next += count as u64;
            left -= count as u64;
        }
        // Read to the end of the body, so that the connection can be used again.
        let _ = reader.read(&mut buffer[..1]);
        Ok(())
    }

    fn paced<'b>(&self, body: &'b mut ureq::Body) -> Paced<ureq::BodyReader<'b>> {
        Paced::new(body.as_reader(), self.patience.slowest, self.patience.silence)
    }

    fn attempts(&self, url: &str, question: Question<'_>) -> Result<Attempts<'_>, HubError> {
        if self.settings.offline {
            return Err(HubError::Offline { what: question.what.to_owned() });
        }
        Ok(Attempts { client: self, url: url.to_owned(), failed: 0, waited: Duration::ZERO, came: 0 })
    }

    /// One request, with the redirects that answer it.
    fn ask(
        &self,
        method: &str,
        url: &str,
        question: Question<'_>,
        range: Option<(u64, u64)>,
    ) -> Result<Reply, Trouble> {
        let pause = lock(&self.not_before).and_then(|then| then.checked_duration_since(Instant::now()));
        pause.into_iter().for_each(sleep);
        let mut linked = Linked::default();
        let known = range.and_then(|_| lock(&self.places).get(url).cloned());
        let from_memory = known.is_some();
        let mut place = known.unwrap_or_else(|| url.to_owned());
        for _ in 0..=REDIRECTS {
            let response = self.send(method, &place, range)?;
            let (status, headers) = (response.status(), response.headers().clone());
            if self.is_hub(&place) {
                linked.take(&headers);
            }
            if status.is_redirection() && headers.contains_key("location") {
                // This asks where the bytes are, not for the bytes.
                if method == "HEAD" && linked.digest.is_some() && linked.size.is_some() {
                    return Ok(Reply { body: response.into_body(), status, headers, linked });
                }
                let target = redirected(&place, text(&headers, "location").unwrap_or_default());
                let wrong = |problem: &str| HubError::Protocol { url: place.clone(), problem: problem.to_owned() };
                place = target.map_err(|problem| Trouble::Final(wrong(problem)))?;
                continue;
            }
            if status.is_success() {
                if let Some(coding) = text(&headers, "content-encoding").filter(|c| !c.eq_ignore_ascii_case("identity"))
                {
                    return Err(Trouble::passing(format!(
                        "it compresses its answer ({coding}), which nobody asked for"
                    )));
                }
                if range.is_some() && place != url {
                    lock(&self.places).insert(url.to_owned(), place);
                }
                return Ok(Reply { body: response.into_body(), status, headers, linked });
            }
            // Addresses of bytes are valid only for a while; the hub gives a new one.
            if !self.is_hub(&place) && status.is_client_error() && status != StatusCode::TOO_MANY_REQUESTS {
                lock(&self.places).remove(url);
                let pause = from_memory.then_some(Duration::ZERO);
                let problem = format!("the host that has the bytes refuses them ({status})");
                return Err(Trouble::Passing { problem, pause, busy: false });
            }
            return Err(self.refusal(&place, status, &headers, question));
        }
        Err(Trouble::Final(HubError::Protocol {
            url: url.to_owned(),
            problem: format!("it leads to another address more than {REDIRECTS} times"),
        }))
    }

    fn send(
        &self,
        method: &str,
        url: &str,
        range: Option<(u64, u64)>,
    ) -> Result<ureq::http::Response<ureq::Body>, Trouble> {
        let mut request = ureq::http::Request::builder().method(method).uri(url);
        if let Some(token) = self.settings.token.as_ref().filter(|_| self.is_hub(url)) {
            request = request.header("authorization", token.header());
        }
        if let Some((first, end)) = range {
            request = request.header("range", format!("bytes={first}-{}", end - 1));
        }
        let protocol = |problem: String| Trouble::Final(HubError::Protocol { url: url.to_owned(), problem });
        let request = request.body(()).map_err(|e| protocol(format!("it is no address ({e})")))?;
        self.agent.run(request).map_err(|e| match e {
            ureq::Error::BadUri(_) | ureq::Error::Http(_) => protocol(format!("it is no address ({e})")),
            ureq::Error::Rustls(_) | ureq::Error::Tls(_) | ureq::Error::Pem(_) => protocol(format!(
                "there is no safe connection ({e}). If a proxy with a certificate of its own stands between, name that in \
                 SSL_CERT_FILE"
            )),
            other => Trouble::passing(other.to_string()),
        })
    }

    /// Whether an address is the hub's, which may get the token.
    fn is_hub(&self, url: &str) -> bool {
        origin(url).is_some() && origin(url) == origin(&self.settings.endpoint)
    }

    /// The error for a status that is not a success.
    fn refusal(&self, url: &str, status: StatusCode, headers: &HeaderMap, question: Question<'_>) -> Trouble {
        let header = |name: &str| text(headers, name).unwrap_or_default().to_owned();
        let (code, message) = (header("x-error-code"), header("x-error-message"));
        let repo = question.repo.to_owned();
        let has_token = self.settings.token.is_some();
        let said = if message.is_empty() { status.to_string() } else { format!("{status}: {message}") };
        let gated = code == "GatedRepo" || message.contains("gated") || message.contains("restricted");
        let absent = |what: String, advice: &str| Trouble::Final(HubError::Absent { what, advice: advice.to_owned() });
        match status.as_u16() {
            401 | 403 if gated => Trouble::Final(HubError::Gated { page: self.page(&repo), repo, has_token }),
            401 if !has_token => Trouble::Final(HubError::NoToken { repo }),
            401 | 403 => Trouble::Final(HubError::Refused { repo, problem: said, has_token }),
            404 | 410 if code == "RevisionNotFound" => {
                absent(question.what.to_owned(), ". Its page lists branches and tags under `Files`")
            }
            404 | 410 if code == "RepoNotFound" => absent(format!("the model {repo}"), ". Check its name"),
            404 | 410 => absent(question.what.to_owned(), ". Check names and revision"),
            429 => Trouble::Passing {
                problem: said,
                pause: Some(asked_pause(headers).unwrap_or(Duration::from_secs(1))),
                busy: true,
            },
            408 | 416 | 425 | 500..=599 => Trouble::Passing { problem: said, pause: asked_pause(headers), busy: false },
            _ => Trouble::Final(HubError::Protocol { url: url.to_owned(), problem: format!("it answers {said}") }),
        }
    }
}

impl Attempts<'_> {
    /// This many bytes have come.
    fn progressed(&mut self, bytes: u64) {
        self.came += bytes;
        if self.came >= self.client.patience.slowest {
            (self.failed, self.waited, self.came) = (0, Duration::ZERO, 0);
        }
    }

    /// Waits before the next attempt, or gives up.
    fn failed(&mut self, trouble: Trouble) -> Result<(), HubError> {
        let (problem, pause, busy) = match trouble {
            Trouble::Final(error) => return Err(error),
            Trouble::Passing { problem, pause, busy } => (problem, pause, busy),
        };
        let Patience { attempts, first_pause, longest_pause, longest_wait, .. } = self.client.patience;
        self.failed += 1;
        let own = first_pause.saturating_mul(1 << (self.failed - 1).min(16)).min(longest_pause);
        // So that not all threads try again at the same moment.
        let own = own.mul_f64(0.75 + 0.5 * jitter());
        let pause = pause.map_or(own, |asked| if busy { asked.max(own) } else { asked.min(longest_wait) });
        self.waited = self.waited.saturating_add(pause);
        let url = self.url.clone();
        if busy && self.waited > longest_wait {
            let problem = format!("{problem}; it asks for a pause of {} s", pause.as_secs());
            return Err(HubError::Busy { url, problem });
        }
        // A request that waits because the hub asks for it has not failed.
        if !busy && self.failed >= attempts {
            return Err(HubError::Unreachable { url, problem, attempts });
        }
        if busy {
            let until = Instant::now() + pause;
            let mut not_before = lock(&self.client.not_before);
            *not_before = Some(not_before.map_or(until, |then| then.max(until)));
        }
        if pause >= LONG_PAUSE {
            self.client.say(&format!("{url}: {problem}; trying again in {} s", pause.as_secs()));
        }
        sleep(pause);
        Ok(())
    }
}

impl Linked {
    fn take(&mut self, headers: &HeaderMap) {
        if let Some(commit) = text(headers, "x-repo-commit") {
            self.commit = Some(commit.to_owned());
        }
        let tag = text(headers, "x-linked-etag").or_else(|| text(headers, "etag"));
        if let Some(digest) = tag.and_then(Digest::parse) {
            self.digest = Some(digest);
        }
        if let Some(size) = number(headers, "x-linked-size") {
            self.size = Some(size);
        }
    }
}

/// Whether two digests are of one kind: a server may state the digest of a Git LFS pointer instead of that of the
/// file.
fn comparable(a: &Digest, b: &Digest) -> bool {
    std::mem::discriminant(a) == std::mem::discriminant(b)
}

/// A number between 0 and 1 that differs from thread to thread and from call to call. Only pauses depend on it.
fn jitter() -> f64 {
    use std::hash::{BuildHasher as _, RandomState};
    (RandomState::new().hash_one(0u8) % 1024) as f64 / 1024.0
}

/// A thread that panicked leaves these values whole, because every change to them is one step.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
