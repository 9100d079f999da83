//! What the tests share.

#![allow(dead_code, reason = "not every test uses everything")]

pub mod server;
pub mod shards;
pub mod watch;

use std::sync::Arc;
use std::time::Duration;

use server::Server;
use sluice_hub::{Client, Patience, Settings, Token};

/// A client of a server that is not patient.
pub fn client_of(endpoint: &str, token: Option<&str>) -> Arc<Client> {
    client_with(settings(endpoint, token))
}

pub fn settings(endpoint: &str, token: Option<&str>) -> Settings {
    let (endpoint, token) = (endpoint.to_owned(), token.and_then(Token::new));
    Settings { endpoint, token, offline: false, certificates: None, cache: None }
}

pub fn client_with(settings: Settings) -> Arc<Client> {
    let patience = Patience {
        attempts: 8,
        first_pause: Duration::from_millis(1),
        longest_pause: Duration::from_millis(20),
        longest_wait: Duration::from_secs(2),
        connect: Duration::from_secs(2),
        silence: Duration::from_secs(5),
        slowest: 256,
    };
    Arc::new(Client::with_patience(settings, patience, None).unwrap())
}

pub fn client(server: &Server) -> Arc<Client> {
    client_of(&server.address, None)
}

/// Bytes that repeat nowhere.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x.to_le_bytes()
    };
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        out.extend(next());
    }
    out.truncate(len);
    out
}
