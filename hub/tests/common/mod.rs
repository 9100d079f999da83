//! What the tests share.

#![allow(dead_code, reason = "not every test uses everything")]

pub mod server;
pub mod shards;

use std::sync::Arc;
use std::time::Duration;

use server::Server;
use sluice_hub::{Client, Patience, Settings, Token};

/// A client of a server that is not patient.
pub fn client_of(endpoint: &str, token: Option<&str>) -> Arc<Client> {
    let settings = Settings {
        endpoint: endpoint.to_owned(),
        token: token.and_then(Token::new),
        offline: false,
        certificates: None,
    };
    let patience = Patience {
        attempts: 8,
        first_pause: Duration::from_millis(1),
        longest_pause: Duration::from_millis(20),
        longest_wait: Duration::from_secs(2),
        connect: Duration::from_secs(2),
        silence: Duration::from_secs(5),
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
