//! Listens for connections, and shuts down cleanly.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use sluice_generate::SchedulerOptions;
use sluice_sessions::{Store, StoreError, StoreOptions};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, sleep, timeout};

use crate::app::{App, SOCKETS, router};
use crate::batches::{Batches, worker};
use crate::models::{Models, ModelsError};
use crate::options::{BatchOptions, ServerOptions, SessionOptions};
use crate::stalled::Unstalled;

/// How long a client may take to send the headers of a request.
const HEAD: Duration = Duration::from_secs(30);
/// How long a client may read nothing although there is data for it.
const STALLED: Duration = Duration::from_secs(120);
/// Most bytes of a request's headers.
const HEAD_BYTES: usize = 64 << 10;
/// Most connections at the same time. Further ones wait until one of them ends.
const CONNECTIONS: usize = 1024;
/// How often the server, once told to end, checks whether answers are left.
const LOOK: Duration = Duration::from_millis(20);
/// How long clients may take to read what is left for them once all answers have ended.
const PARTING: Duration = Duration::from_secs(2);

/// Why a server cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// A model cannot be served.
    #[error(transparent)]
    Models(#[from] ModelsError),
    /// The folder of sessions cannot be used.
    #[error(transparent)]
    Sessions(#[from] StoreError),
    /// The folder of responses cannot be used.
    #[error("the folder of responses cannot be used: {0}")]
    Responses(io::Error),
    /// The folder of batches cannot be used.
    #[error("the folder of batches {} cannot be used: {source}", folder.display())]
    Batches {
        /// The folder.
        folder: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The server cannot listen at the address.
    #[error("cannot listen at {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The system's error.
        source: io::Error,
    },
    /// The server would be open to everybody.
    #[error(
        "{address} can be reached from other machines, and no key is set: give --api-key, or --insecure to let everybody use it"
    )]
    Open {
        /// The address.
        address: SocketAddr,
    },
    /// The runtime cannot start.
    #[error("cannot start the server: {0}")]
    Runtime(io::Error),
}

/// A server that listens, but does not serve requests yet.
pub struct Server {
    app: Arc<App>,
    listener: TcpListener,
}

impl Server {
    /// Reads the headers of the model files, checks that memory suffices for each of them, and listens. Models are loaded on demand.
    ///
    /// # Errors
    /// If a file, the memory, the address, or the folder of sessions cannot be used.
    pub async fn bind(options: ServerOptions, insecure: bool) -> Result<Self, ServerError> {
        let address = options.address;
        if !address.ip().is_loopback() && options.guard.keys.is_empty() && !insecure {
            return Err(ServerError::Open { address });
        }
        let store = options.sessions.as_ref().map(open_store).transpose()?;
        let scheduling = SchedulerOptions {
            running: options.parallel,
            queue: Some(options.queue),
            store: store.clone(),
            rest_after: options.rest_after,
            drafts: options.drafts,
            draft_tokens: options.draft_tokens,
            ..SchedulerOptions::default()
        };
        let models = Models::new(&options, scheduling)?;
        let batches = options.batches.as_ref().map(open_batches).transpose()?;
        let listener = TcpListener::bind(address).await.map_err(|source| ServerError::Listen { address, source })?;
        let app = App::new(options, models, store, batches);
        app.responses.open().map_err(ServerError::Responses)?;
        Ok(Server { app, listener })
    }

    /// The address at which it listens.
    ///
    /// # Errors
    /// The system's error.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `ended` completes. Running answers then have some time to finish; those that are left are cancelled, and what
    /// the models remember is kept.
    pub async fn serve(self, ended: impl Future<Output = ()>) {
        let Server { app, listener } = self;
        let router = router(&app);
        let worker = app.batches.clone().map(|batches| {
            let (app, runtime) = (Arc::clone(&app), tokio::runtime::Handle::current());
            tokio::task::spawn_blocking(move || worker::work(&app, &batches, &runtime))
        });
        // The connections hold receivers; they end once it says so.
        let ending = watch::Sender::new(false);
        let places = Arc::new(Semaphore::new(CONNECTIONS));
        tokio::pin!(ended);
        loop {
            let accepted = tokio::select! {
                biased;
                () = &mut ended => break,
                accepted = accept(&listener, &places) => accepted,
            };
            let Ok((stream, place)) = accepted else {
                // Usually there are too many open files, which passes.
                sleep(LOOK).await;
                continue;
            };
            let connection = connection(stream, router.clone(), ending.subscribe());
            tokio::spawn(async move {
                if let Err(error) = connection.await {
                    tracing::debug!(%error, "connection");
                }
                drop(place);
            });
        }
        app.closing.send_replace(true);
        drop(listener);
        if let Some(batches) = &app.batches {
            batches.close();
        }
        if let Some(worker) = worker {
            // A panic of that task has been reported already.
            let _ = worker.await;
        }
        end(&app, ending).await;
    }
}

fn open_store(options: &SessionOptions) -> Result<Arc<Store>, StoreError> {
    let SessionOptions { folder, max_bytes, expire_after } = options.clone();
    Store::open(StoreOptions { folder, max_bytes, expire_after }).map(Arc::new)
}

fn open_batches(options: &BatchOptions) -> Result<Arc<Batches>, ServerError> {
    let failed = |source| ServerError::Batches { folder: options.folder.clone(), source };
    Batches::open(options.clone()).map(Arc::new).map_err(failed)
}

async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> io::Result<(TcpStream, tokio::sync::OwnedSemaphorePermit)> {
    let place = Arc::clone(places).acquire_owned().await.map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    // Tokens are small, and should leave at once.
    stream.set_nodelay(true)?;
    Ok((stream, place))
}

/// Serves a connection, which ends after its current response once it is told to.
async fn connection(stream: TcpStream, router: Router, mut ending: watch::Receiver<bool>) -> hyper::Result<()> {
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD).max_buf_size(HEAD_BYTES);
    let service = TowerToHyperService::new(router);
    let stream = TokioIo::new(Unstalled::new(stream, STALLED));
    let mut connection = pin!(builder.serve_connection(stream, service).with_upgrades());
    tokio::select! {
        done = connection.as_mut() => return done,
        _ = ending.wait_for(|ending| *ending) => connection.as_mut().graceful_shutdown(),
    }
    connection.await
}

async fn end(app: &Arc<App>, ending: watch::Sender<bool>) {
    // If the time is beyond what the clock can represent, there is no limit.
    let deadline = Instant::now().checked_add(app.options.grace);
    while app.live.count() > 0 && deadline.is_none_or(|deadline| Instant::now() < deadline) {
        sleep(LOOK).await;
    }
    app.live.cancel_all();
    // Connections write their remaining data; idle ones are closed. WebSockets are not among them any more, and have places of their own.
    ending.send_replace(true);
    let parted = async { tokio::join!(ending.closed(), app.sockets.acquire_many(SOCKETS)) };
    let _ = timeout(PARTING, parted).await;
    let models = Arc::clone(&app.models);
    let _ = tokio::task::spawn_blocking(move || models.close()).await;
}

/// Serves until the process is told to end (SIGINT, SIGTERM). `ready` is called with the address once the server listens.
///
/// # Errors
/// The errors of [`Server::bind`]; also if the system refuses to start threads.
pub fn serve_until_told(
    options: ServerOptions,
    insecure: bool,
    ready: impl FnOnce(SocketAddr),
) -> Result<(), ServerError> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(ServerError::Runtime)?;
    runtime.block_on(async {
        let server = Server::bind(options, insecure).await?;
        let ended = told_to_end().map_err(ServerError::Runtime)?;
        ready(server.address().map_err(ServerError::Runtime)?);
        server.serve(ended).await;
        Ok(())
    })
}

/// Completes once the process is told to end (SIGINT, SIGTERM).
///
/// # Errors
/// The system's error.
pub fn told_to_end() -> io::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
