//! Only `hub` opens connections: no other crate calls functions that open one, or depends on a crate that would.
//!
//! `cli/tests/optional.rs` checks the same of the running program.

use std::fs;
use std::path::{Path, PathBuf};

/// The crate that may open connections.
const HUB: &str = "hub";
/// Crates that are clients. The server shares `hyper` and `tokio` with some of these, but there they only listen.
const CLIENTS: [&str; 9] =
    ["ureq", "reqwest", "hf-hub", "curl", "isahc", "attohttpc", "minreq", "hyper-rustls", "tokio-rustls"];
/// Functions that open a connection, or send without one, in the standard library and the available crates.
const CALLS: [&str; 10] = [
    "TcpStream::connect",
    "TcpSocket",
    "UdpSocket",
    "UnixStream::connect",
    "UnixDatagram",
    "SYS_connect",
    "libc::connect",
    "socket::connect",
    "hyper::client",
    "client::legacy",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Folders of crates, from the manifest of the workspace.
fn crates() -> Vec<String> {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let members = manifest.split("members = [").nth(1).unwrap().split(']').next().unwrap().to_owned();
    members.split('"').skip(1).step_by(2).map(str::to_owned).filter(|m| m != "tests").collect()
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).into_iter().flatten().map(|e| e.unwrap().path()) {
        if entry.is_dir() {
            sources(&entry, found);
        } else if entry.extension().is_some_and(|e| e == "rs") {
            found.push(entry);
        }
    }
}

#[test]
fn only_the_hub_opens_connections() {
    let crates = crates();
    assert!(crates.iter().any(|c| c == HUB) && crates.len() > 10, "{crates:?}");
    for folder in crates.iter().filter(|c| *c != HUB) {
        let mut files = Vec::new();
        sources(&root().join(folder).join("src"), &mut files);
        assert!(!files.is_empty(), "{folder}");
        for file in files {
            let text = fs::read_to_string(&file).unwrap();
            for (number, line) in text.lines().enumerate() {
                let code = line.split("//").next().unwrap_or(line);
                let call = CALLS.iter().find(|call| code.contains(**call));
                assert!(call.is_none(), "{}:{}: {call:?}: only {HUB}/ opens connections", file.display(), number + 1);
            }
        }
    }
}

#[test]
fn only_the_hub_depends_on_clients() {
    for folder in crates() {
        let manifest = fs::read_to_string(root().join(&folder).join("Cargo.toml")).unwrap();
        let used = |name: &&&str| manifest.lines().any(|line| line.split(['.', ' ', '=']).next() == Some(**name));
        let clients: Vec<&&str> = CLIENTS.iter().filter(used).collect();
        let expected: &[&&str] = if folder == HUB { &[&"ureq"] } else { &[] };
        assert_eq!(clients, expected, "{folder}");
    }
    // Nor does a crate from elsewhere bring such a crate.
    let lock = fs::read_to_string(root().join("Cargo.lock")).unwrap();
    for package in lock.split("[[package]]").skip(1) {
        let name = package.split("name = \"").nth(1).unwrap().split('"').next().unwrap();
        let needs = package.split("dependencies = [").nth(1).unwrap_or_default();
        let uses = |client: &str| needs.contains(&format!("\"{client}\"")) || needs.contains(&format!("\"{client} "));
        let client = CLIENTS.iter().find(|client| uses(client));
        assert!(client.is_none() || name == "sluice-hub", "{name} brings {client:?}");
    }
}
