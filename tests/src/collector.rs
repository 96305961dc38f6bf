//! A collector of traces, as OpenTelemetry's own has it: OTLP over gRPC.

use std::sync::{Arc, Mutex, PoisonError};

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::trace::v1::Span;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// A collector that listens until it is dropped.
#[derive(Debug)]
pub struct Collector {
    /// Where it listens: `http://127.0.0.1:PORT`.
    pub endpoint: String,
    received: Received,
    _runtime: Runtime,
}

#[derive(Clone, Debug, Default)]
struct Received {
    services: Arc<Mutex<Vec<String>>>,
    spans: Arc<Mutex<Vec<Span>>>,
}

#[tonic::async_trait]
impl TraceService for Received {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for of_resource in request.into_inner().resource_spans {
            let names = of_resource.resource.into_iter().flat_map(|resource| resource.attributes);
            let names =
                names.filter(|fact| fact.key == "service.name").map(|fact| format!("{:?}", fact.value));
            self.services.lock().unwrap_or_else(PoisonError::into_inner).extend(names);
            let spans = of_resource.scope_spans.into_iter().flat_map(|of_scope| of_scope.spans);
            self.spans.lock().unwrap_or_else(PoisonError::into_inner).extend(spans);
        }
        Ok(Response::new(ExportTraceServiceResponse { partial_success: None }))
    }
}

impl Collector {
    /// Listens on a free port of loopback.
    pub fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let received = Received::default();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("a free port");
        let endpoint = format!("http://{}", listener.local_addr().expect("it listens"));
        let server = tonic::transport::Server::builder()
            .add_service(TraceServiceServer::new(received.clone()))
            .serve_with_incoming(TcpListenerStream::new(listener));
        runtime.spawn(server);
        Self { endpoint, received, _runtime: runtime }
    }

    /// All spans that came, in the order in which they came.
    pub fn spans(&self) -> Vec<Span> {
        self.received.spans.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Who sent them, one for each time that some came.
    pub fn services(&self) -> Vec<String> {
        self.received.services.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
