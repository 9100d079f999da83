//! The objects of `/v1/files` and `/v1/batches`, as clients see them and as they are kept.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::api::openai::now;

/// A file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileObject {
    /// Its id.
    pub id: String,
    /// Bytes.
    pub bytes: u64,
    /// Seconds since 1970.
    pub created_at: u64,
    /// The name that the client gave it.
    pub filename: String,
    /// `batch` or `batch_output`.
    pub purpose: String,
}

impl FileObject {
    /// What clients are told.
    pub fn to_json(&self) -> Value {
        json!({
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created_at,
            "expires_at": null,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": null,
        })
    }
}

/// How far a batch is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Its input has yet to be looked at.
    Validating,
    /// Its input cannot be used, or it cannot go on.
    Failed,
    /// Its requests are being answered.
    InProgress,
    /// Its results are being put into files.
    Finalizing,
    /// It is done.
    Completed,
    /// It is to end.
    Cancelling,
    /// It has ended early. What was done until then is there.
    Cancelled,
}

impl Status {
    /// Whether there is nothing left to do.
    pub fn is_final(self) -> bool {
        matches!(self, Status::Failed | Status::Completed | Status::Cancelled)
    }

    /// The field that says since when.
    fn time(self) -> Option<&'static str> {
        Some(match self {
            Status::Validating => return None,
            Status::Failed => "failed_at",
            Status::InProgress => "in_progress_at",
            Status::Finalizing => "finalizing_at",
            Status::Completed => "completed_at",
            Status::Cancelling => "cancelling_at",
            Status::Cancelled => "cancelled_at",
        })
    }
}

/// Requests of a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// In all.
    pub total: usize,
    /// Answered.
    pub completed: usize,
    /// Failed.
    pub failed: usize,
}

/// What is wrong with a batch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// A word for programs.
    pub code: String,
    /// What is wrong.
    pub message: String,
    /// The line of the input, from 1.
    pub line: Option<usize>,
    /// The field.
    pub param: Option<String>,
}

/// A batch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BatchObject {
    /// Its id.
    pub id: String,
    /// The path that its requests name.
    pub endpoint: String,
    /// The file with its requests.
    pub input_file_id: String,
    /// What the client said of the time it has; nobody is held to it.
    pub completion_window: String,
    /// How far it is.
    pub status: Status,
    /// Seconds since 1970 at which it was made.
    pub created_at: u64,
    /// When it got which status.
    pub times: BTreeMap<String, u64>,
    /// What is wrong with it.
    pub problems: Vec<Problem>,
    /// Its requests.
    pub counts: Counts,
    /// The file with results.
    pub output_file_id: Option<String>,
    /// The file with the results of requests that failed.
    pub error_file_id: Option<String>,
    /// Keys and values of the client's own.
    pub metadata: Option<BTreeMap<String, String>>,
}

impl BatchObject {
    /// Gives it a status, from now on.
    pub fn set(&mut self, status: Status) {
        self.status = status;
        if let Some(time) = status.time() {
            self.times.entry(time.to_owned()).or_insert_with(now);
        }
    }

    /// Sets it, unless the batch has ended or is to end. Between a look at the status and this, a client may have cancelled it.
    pub fn advance(&mut self, status: Status) {
        if !self.status.is_final() && self.status != Status::Cancelling {
            self.set(status);
        }
    }

    /// What clients are told.
    pub fn to_json(&self) -> Value {
        let errors = match &self.problems[..] {
            [] => Value::Null,
            problems => json!({"object": "list", "data": problems}),
        };
        let mut object = json!({
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": errors,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": self.status,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.created_at,
            "expires_at": null,
            "expired_at": null,
            "request_counts": self.counts,
            "metadata": self.metadata,
        });
        let statuses = [
            Status::InProgress,
            Status::Finalizing,
            Status::Completed,
            Status::Failed,
            Status::Cancelling,
            Status::Cancelled,
        ];
        for time in statuses.into_iter().filter_map(Status::time) {
            object[time] = json!(self.times.get(time));
        }
        object
    }
}
