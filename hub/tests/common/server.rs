//! A server that speaks the hub's interface on this machine, and does it as badly as it is told to.

#![allow(dead_code, reason = "not every test does everything")]

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};

/// The token that opens gated repositories.
pub const TOKEN: &str = "hf_tests";
/// Entries of a page of a listing.
const PAGE: usize = 3;

/// What goes wrong, each in so many of a thousand answers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// The line breaks in the middle of the body.
    pub cut: u64,
    /// 429, with `Retry-After: 0`.
    pub busy: u64,
    /// 503.
    pub failing: u64,
    /// A length that is not that of the body, or a range that is not the one that was asked for.
    pub wrong_length: u64,
    /// Addresses of bytes are refused, as if they had expired.
    pub expired: u64,
}

/// The files of a commit.
pub type Files = BTreeMap<String, Vec<u8>>;

#[derive(Default)]
struct Repo {
    commits: BTreeMap<String, Files>,
    main: String,
    /// Other branches and tags, and their commits.
    names: BTreeMap<String, String>,
    gated: bool,
    renamed: Option<String>,
}

/// What is known of the requests so far.
#[derive(Debug, Default)]
pub struct Seen {
    pub requests: AtomicU64,
    pub bytes: AtomicU64,
    /// Whether the other host, which has the bytes, was told who asks.
    pub token_leaked: AtomicBool,
    pub redirected: AtomicU64,
    pub refused: AtomicU64,
    pub cut: AtomicU64,
}

struct Shared {
    repos: Mutex<BTreeMap<String, Repo>>,
    faults: Mutex<Faults>,
    /// Paths whose bytes are served wrong so many times.
    damaged: Mutex<BTreeMap<String, u32>>,
    seen: Seen,
    random: AtomicU64,
    /// Without listings, as simple mirrors are.
    no_listings: AtomicBool,
    /// Pause before each piece of a body of 64 KiB, in microseconds.
    pause: AtomicU64,
    /// Address of the host that has the bytes.
    store: Mutex<String>,
}

/// The server, of two hosts: the hub, and one that has the bytes of large files.
pub struct Server {
    pub address: String,
    shared: Arc<Shared>,
}

impl Server {
    pub fn start() -> Server {
        let shared = Arc::new(Shared {
            repos: Mutex::default(),
            faults: Mutex::default(),
            damaged: Mutex::default(),
            seen: Seen::default(),
            random: AtomicU64::new(0x9e37_79b9_7f4a_7c15),
            no_listings: AtomicBool::new(false),
            pause: AtomicU64::new(0),
            store: Mutex::default(),
        });
        let [hub, store] = [false, true].map(|is_store| {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = format!("http://{}", listener.local_addr().unwrap());
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let shared = Arc::clone(&shared);
                    thread::spawn(move || _ = serve(&shared, stream, is_store));
                }
            });
            address
        });
        *shared.store.lock().unwrap() = store;
        Server { address: hub, shared }
    }

    /// Adds a repository, or moves the branch `main` of one to other files; returns the commit.
    pub fn commit(&self, repo: &str, files: Files) -> String {
        let mut repos = self.shared.repos.lock().unwrap();
        let entry = repos.entry(repo.to_owned()).or_default();
        let commit = format!("{:040x}", 0xc0_ffee + entry.commits.len());
        entry.commits.insert(commit.clone(), files);
        entry.main.clone_from(&commit);
        commit
    }

    /// Gives a commit the name of a branch or tag.
    pub fn name(&self, repo: &str, name: &str, commit: &str) {
        let mut repos = self.shared.repos.lock().unwrap();
        repos.get_mut(repo).unwrap().names.insert(name.to_owned(), commit.to_owned());
    }

    /// Forgets all commits of a repository but that of `main`, as a branch that is pushed anew does.
    pub fn forget(&self, repo: &str) {
        let mut repos = self.shared.repos.lock().unwrap();
        let repo = repos.get_mut(repo).unwrap();
        repo.commits.retain(|commit, _| *commit == repo.main);
    }

    pub fn gate(&self, repo: &str) {
        self.shared.repos.lock().unwrap().get_mut(repo).unwrap().gated = true;
    }

    /// Has a name lead to another repository.
    pub fn rename(&self, from: &str, to: &str) {
        let repo = Repo { renamed: Some(to.to_owned()), ..Repo::default() };
        self.shared.repos.lock().unwrap().insert(from.to_owned(), repo);
    }

    pub fn faults(&self, faults: Faults) {
        *self.shared.faults.lock().unwrap() = faults;
    }

    /// Serves wrong bytes for a path, so many times.
    pub fn damage(&self, path: &str, times: u32) {
        self.shared.damaged.lock().unwrap().insert(path.to_owned(), times);
    }

    pub fn without_listings(&self) {
        self.shared.no_listings.store(true, Ordering::Relaxed);
    }

    pub fn slow_down(&self, microseconds: u64) {
        self.shared.pause.store(microseconds, Ordering::Relaxed);
    }

    pub fn seen(&self) -> &Seen {
        &self.shared.seen
    }
}

impl Shared {
    /// Whether what happens in so many of a thousand cases happens now.
    fn happens(&self, thousandths: u64) -> bool {
        self.random() % 1000 < thousandths
    }

    fn random(&self) -> u64 {
        let mut x = self.random.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }
}

struct Request {
    method: String,
    path: String,
    query: String,
    range: Option<(u64, u64)>,
    has_token: bool,
}

#[derive(Default)]
struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// Content that may be served in part.
    is_file: bool,
}

fn answer(status: u16, headers: Vec<(&'static str, String)>, body: impl Into<Vec<u8>>) -> Answer {
    Answer { status, headers, body: body.into(), is_file: false }
}

fn serve(shared: &Shared, stream: TcpStream, is_store: bool) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut stream = stream;
    while let Some(request) = read_request(&mut reader)? {
        shared.seen.requests.fetch_add(1, Ordering::Relaxed);
        if is_store && request.has_token {
            shared.seen.token_leaked.store(true, Ordering::Relaxed);
        }
        let faults = *shared.faults.lock().unwrap();
        let mut answer = if shared.happens(faults.busy) {
            answer(429, vec![("Retry-After", "0".into())], "slow down")
        } else if shared.happens(faults.failing) {
            answer(503, Vec::new(), "later")
        } else if is_store {
            if shared.happens(faults.expired) { answer(403, Vec::new(), "expired") } else { content(shared, &request) }
        } else {
            hub(shared, &request)
        };
        if answer.status >= 400 {
            shared.seen.refused.fetch_add(1, Ordering::Relaxed);
        }
        let mut length_field = None;
        if let Some((first, last)) = request.range.filter(|_| answer.is_file && answer.status == 200) {
            let total = answer.body.len() as u64;
            let last = last.min(total.saturating_sub(1));
            answer.status = 206;
            answer.body = answer.body[first as usize..=last as usize].to_vec();
            let mut stated = (first, last, total);
            if shared.happens(faults.wrong_length) {
                match shared.random() % 4 {
                    0 => stated.2 += 1,
                    1 => stated.0 += 1,
                    2 => length_field = Some(answer.body.len() as u64 / 2),
                    _ => length_field = Some(answer.body.len() as u64 + 7),
                }
            }
            answer.headers.push(("Content-Range", format!("bytes {}-{}/{}", stated.0, stated.1, stated.2)));
        }
        let cut = request.method != "HEAD" && shared.happens(faults.cut);
        if !write_answer(shared, &mut stream, &request, &answer, length_field, cut)? {
            return Ok(());
        }
    }
    Ok(())
}

/// Writes an answer; returns whether the connection can go on.
fn write_answer(
    shared: &Shared,
    stream: &mut TcpStream,
    request: &Request,
    answer: &Answer,
    length_field: Option<u64>,
    cut: bool,
) -> std::io::Result<bool> {
    let len = length_field.unwrap_or(answer.body.len() as u64);
    let mut head = format!("HTTP/1.1 {} X\r\nContent-Length: {len}\r\n", answer.status);
    for (name, value) in &answer.headers {
        head += &format!("{name}: {value}\r\n");
    }
    stream.write_all((head + "\r\n").as_bytes())?;
    if request.method == "HEAD" {
        return Ok(true);
    }
    let end = if cut { shared.random() as usize % answer.body.len().max(1) } else { answer.body.len() };
    for piece in answer.body[..end].chunks(64 << 10) {
        let pause = shared.pause.load(Ordering::Relaxed);
        if pause > 0 {
            thread::sleep(std::time::Duration::from_micros(pause));
        }
        stream.write_all(piece)?;
        shared.seen.bytes.fetch_add(piece.len() as u64, Ordering::Relaxed);
    }
    if cut {
        shared.seen.cut.fetch_add(1, Ordering::Relaxed);
    }
    Ok(!cut && length_field.is_none())
}

fn read_request(reader: &mut BufReader<TcpStream>) -> std::io::Result<Option<Request>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace();
    let (method, target) = (words.next().unwrap_or("").to_owned(), words.next().unwrap_or("").to_owned());
    let (mut range, mut has_token) = (None, false);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
            break;
        }
        let (name, value) = line.trim().split_once(": ").unwrap_or_default();
        match name.to_ascii_lowercase().as_str() {
            "range" => {
                let bounds = value.strip_prefix("bytes=").and_then(|v| v.split_once('-'));
                range = bounds.and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
            }
            "authorization" => has_token = value == format!("Bearer {TOKEN}"),
            _ => {}
        }
    }
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    Ok(Some(Request { method, path: unescaped(path), query: query.to_owned(), range, has_token }))
}

fn unescaped(path: &str) -> String {
    let mut out = Vec::new();
    let mut bytes = path.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'%' => {
                let pair: String = bytes.by_ref().take(2).map(char::from).collect();
                out.push(u8::from_str_radix(&pair, 16).unwrap_or(b'?'));
            }
            other => out.push(other),
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// The hub itself.
fn hub(shared: &Shared, request: &Request) -> Answer {
    let repos = shared.repos.lock().unwrap();
    let api = request.path.strip_prefix("/api/models/");
    let rest = api.unwrap_or(request.path.trim_start_matches('/'));
    let mut segments = rest.splitn(4, '/');
    let name = format!("{}/{}", segments.next().unwrap_or(""), segments.next().unwrap_or(""));
    let (verb, rest) = (segments.next().unwrap_or(""), segments.next().unwrap_or(""));
    let error = |status, code: &str| answer(status, vec![("X-Error-Code", code.to_owned())], "no");
    let Some(repo) = repos.get(&name) else {
        return if request.has_token { error(404, "RepoNotFound") } else { error(401, "RepoNotFound") };
    };
    if let Some(to) = &repo.renamed {
        let location = request.path.replacen(&name, to, 1);
        return answer(307, vec![("Location", location)], "");
    }
    if repo.gated && !request.has_token {
        return error(401, "GatedRepo");
    }
    let commit_of = |revision: &str| {
        let commit = if revision == "main" { Some(&repo.main) } else { repo.names.get(revision) };
        repo.commits.get_key_value(commit.map_or(revision, String::as_str))
    };
    match (api.is_some(), verb) {
        (true, "revision") => {
            let Some((commit, files)) = commit_of(rest) else { return error(404, "RevisionNotFound") };
            let siblings: Vec<String> = files.keys().map(|p| format!("{{\"rfilename\":{p:?}}}")).collect();
            let json = format!("{{\"id\":{name:?},\"sha\":{commit:?},\"siblings\":[{}]}}", siblings.join(","));
            answer(200, Vec::new(), json)
        }
        (true, "tree") => {
            if shared.no_listings.load(Ordering::Relaxed) {
                return error(404, "");
            }
            let Some((_, files)) = commit_of(rest) else { return error(404, "RevisionNotFound") };
            let start = request.query.split("cursor=").nth(1).map_or(0, |n| n.parse().unwrap());
            let entries: Vec<String> = files.iter().skip(start).take(PAGE).map(|(p, b)| entry(p, b)).collect();
            let mut headers = Vec::new();
            if start + PAGE < files.len() {
                let next = format!(
                    "<https://elsewhere.example{}?recursive=true&cursor={}>; rel=\"next\"",
                    request.path,
                    start + PAGE
                );
                headers.push(("Link", next));
            }
            answer(
                200,
                headers,
                format!("[{{\"type\":\"directory\",\"path\":\"x\",\"oid\":\"\"}},{}]", entries.join(",")),
            )
        }
        (false, "resolve") => {
            let (revision, path) = rest.split_once('/').unwrap_or_default();
            let Some((commit, files)) = commit_of(revision) else { return error(404, "RevisionNotFound") };
            let Some(bytes) = files.get(path) else { return error(404, "EntryNotFound") };
            let mut headers = vec![("X-Repo-Commit", commit.clone())];
            if !is_large(path) {
                headers.push(("ETag", format!("\"{}\"", git_id(bytes))));
                return Answer { status: 200, headers, body: bytes.clone(), is_file: true };
            }
            shared.seen.redirected.fetch_add(1, Ordering::Relaxed);
            headers.push(("X-Linked-ETag", format!("\"{}\"", sha256(bytes))));
            headers.push(("X-Linked-Size", bytes.len().to_string()));
            let store = shared.store.lock().unwrap();
            headers.push(("Location", format!("{store}/{name}/{commit}/{path}?X-Signature=1")));
            answer(302, headers, "")
        }
        _ => error(404, ""),
    }
}

/// The host that has the bytes.
fn content(shared: &Shared, request: &Request) -> Answer {
    let repos = shared.repos.lock().unwrap();
    let mut segments = request.path.trim_start_matches('/').splitn(4, '/');
    let name = format!("{}/{}", segments.next().unwrap_or(""), segments.next().unwrap_or(""));
    let (commit, path) = (segments.next().unwrap_or(""), segments.next().unwrap_or(""));
    let bytes = repos.get(&name).and_then(|repo| repo.commits.get(commit)?.get(path));
    let Some(bytes) = bytes else { return answer(404, Vec::new(), "") };
    let mut body = bytes.clone();
    // The last byte, so that a header is read as it is.
    if request.range.is_none_or(|(_, last)| last + 1 >= body.len() as u64)
        && let Some(times) = shared.damaged.lock().unwrap().get_mut(path).filter(|times| **times > 0)
    {
        *times -= 1;
        *body.last_mut().unwrap() ^= 1;
    }
    Answer { status: 200, headers: Vec::new(), body, is_file: true }
}

/// The digest that the hub states of a file: SHA-256 of what Git LFS keeps, git's own of others.
pub fn digest(path: &str, bytes: &[u8]) -> String {
    if is_large(path) { sha256(bytes) } else { git_id(bytes) }
}

/// Whether the hub keeps a file with Git LFS.
fn is_large(path: &str) -> bool {
    path.ends_with(".safetensors") || path.ends_with(".gguf")
}

fn entry(path: &str, bytes: &[u8]) -> String {
    let size = bytes.len();
    if is_large(path) {
        let pointer = format!("{:040x}", size + 1);
        let lfs = format!("{{\"oid\":\"{}\",\"size\":{size},\"pointerSize\":134}}", sha256(bytes));
        return format!("{{\"type\":\"file\",\"path\":{path:?},\"oid\":\"{pointer}\",\"size\":{size},\"lfs\":{lfs}}}");
    }
    format!("{{\"type\":\"file\",\"path\":{path:?},\"oid\":\"{}\",\"size\":{size}}}", git_id(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn sha256(bytes: &[u8]) -> String {
    hex(ring::digest::digest(&SHA256, bytes).as_ref())
}

fn git_id(bytes: &[u8]) -> String {
    let mut context = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
    context.update(format!("blob {}\0", bytes.len()).as_bytes());
    context.update(bytes);
    hex(context.finish().as_ref())
}
