//! Listening, and ending well.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use sluice_format::FormatError;
use sluice_generate::SchedulerOptions;
use sluice_sessions::{Store, StoreError, StoreOptions};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout};

use crate::app::{App, router};
use crate::batches::{Batches, worker};
use crate::models::Models;
use crate::options::{BatchOptions, ServerOptions, SessionOptions};
use crate::stalled::Unstalled;

/// How long a client may take to send the head of a request.
const HEAD: Duration = Duration::from_secs(30);
/// How long a client may take nothing of what there is for it.
const STALLED: Duration = Duration::from_secs(120);
/// Most bytes of the head of a request.
const HEAD_BYTES: usize = 64 << 10;
/// Most connections at a time. More wait for one of them to end.
const CONNECTIONS: usize = 1024;
/// How often the server, once told to end, looks whether answers are left.
const LOOK: Duration = Duration::from_millis(20);

/// Why a server does not begin.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// A file is not a model file.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The folder of sessions.
    #[error(transparent)]
    Sessions(#[from] StoreError),
    /// The folder of responses.
    #[error("the folder of responses cannot be used: {0}")]
    Responses(io::Error),
    /// The folder of batches.
    #[error("the folder of batches {} cannot be used: {source}", folder.display())]
    Batches {
        /// The folder.
        folder: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The address.
    #[error("cannot listen at {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system says.
        source: io::Error,
    },
    /// Everybody could use it.
    #[error(
        "{address} can be reached from other machines, and no key is set: give --api-key, or --insecure to let everybody use it"
    )]
    Open {
        /// The address.
        address: SocketAddr,
    },
    /// The runtime.
    #[error("cannot start the server: {0}")]
    Runtime(io::Error),
}

/// A server that listens, but does not serve yet.
pub struct Server {
    app: Arc<App>,
    listener: TcpListener,
}

impl Server {
    /// Looks at the model files, and listens. Models are loaded when they are asked for.
    ///
    /// # Errors
    /// What is wrong with a file, the address, or the folder of sessions.
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

    /// Where it listens.
    ///
    /// # Errors
    /// What the system says.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `ended` is. Answers that are being made have some time to end then; what is left is cancelled, and what the models
    /// remember is kept.
    pub async fn serve(self, ended: impl Future<Output = ()>) {
        let Server { app, listener } = self;
        let router = router(&app);
        let worker = app.batches.clone().map(|batches| {
            let (app, runtime) = (Arc::clone(&app), tokio::runtime::Handle::current());
            tokio::task::spawn_blocking(move || worker::work(&app, &batches, &runtime))
        });
        let graceful = GracefulShutdown::new();
        let places = Arc::new(Semaphore::new(CONNECTIONS));
        tokio::pin!(ended);
        loop {
            let accepted = tokio::select! {
                biased;
                () = &mut ended => break,
                accepted = accept(&listener, &places) => accepted,
            };
            let Ok((stream, place)) = accepted else {
                // Too many open files, mostly: that passes.
                sleep(LOOK).await;
                continue;
            };
            let connection = connection(stream, router.clone(), &graceful);
            tokio::spawn(async move {
                if let Err(error) = connection.await {
                    tracing::debug!(%error, "connection");
                }
                drop(place);
            });
        }
        app.closing.store(true, Ordering::Relaxed);
        drop(listener);
        if let Some(batches) = &app.batches {
            batches.close();
        }
        if let Some(worker) = worker {
            // A panic over there has been reported.
            let _ = worker.await;
        }
        end(&app, graceful).await;
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

fn connection(
    stream: TcpStream,
    router: Router,
    graceful: &GracefulShutdown,
) -> impl Future<Output = hyper::Result<()>> + Send + use<> {
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD).max_buf_size(HEAD_BYTES);
    let service = TowerToHyperService::new(router);
    graceful.watch(builder.serve_connection(TokioIo::new(Unstalled::new(stream, STALLED)), service))
}

async fn end(app: &Arc<App>, graceful: GracefulShutdown) {
    // Of a time that no clock can show, all is left.
    let deadline = Instant::now().checked_add(app.options.grace);
    while app.live.count() > 0 && deadline.is_none_or(|deadline| Instant::now() < deadline) {
        sleep(LOOK).await;
    }
    app.live.cancel_all();
    // Connections write what is left; idle ones are closed.
    let _ = timeout(Duration::from_secs(2), graceful.shutdown()).await;
    let models = Arc::clone(&app.models);
    let _ = tokio::task::spawn_blocking(move || models.close()).await;
}

/// Serves until the process is told to end (SIGINT, SIGTERM). `ready` is called with the address once the server listens.
///
/// # Errors
/// As [`Server::bind`], and when the system gives no threads.
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

/// Ends once the process is told to end (SIGINT, SIGTERM).
///
/// # Errors
/// What the system says.
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
