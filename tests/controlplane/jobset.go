package main

import (
	"flag"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/go-logr/logr"
	"k8s.io/apimachinery/pkg/runtime"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/util/cert"
	ctrl "sigs.k8s.io/controller-runtime"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"
	"sigs.k8s.io/controller-runtime/pkg/webhook"
	jobset "sigs.k8s.io/jobset/api/jobset/v1alpha2"
	"sigs.k8s.io/jobset/pkg/controllers"
	"sigs.k8s.io/jobset/pkg/webhooks"
)

// jobSets runs JobSet's controller and its webhooks, as the program of that project does, but for certificates: those of the
// webhooks are made in --cert-dir for 127.0.0.1, and tls.crt there is its own CA.
func jobSets(arguments []string) error {
	flags := flag.NewFlagSet("jobset-controller", flag.ExitOnError)
	kubeconfig := flags.String("kubeconfig", "", "where the API server is")
	port := flags.Int("webhook-port", 0, "port of the webhooks on 127.0.0.1")
	folder := flags.String("cert-dir", "", "a folder for the webhooks' certificate and key")
	if err := flags.Parse(arguments); err != nil {
		return err
	}
	ctrl.SetLogger(logr.FromSlogHandler(slog.NewTextHandler(os.Stderr, nil)))
	certificate, key, err := cert.GenerateSelfSignedCertKey("127.0.0.1", nil, nil)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(*folder, 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(*folder, "tls.key"), key, 0o600); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(*folder, "tls.crt"), certificate, 0o600); err != nil {
		return err
	}
	config, err := clientcmd.BuildConfigFromFlags("", *kubeconfig)
	if err != nil {
		return err
	}
	scheme := runtime.NewScheme()
	utilruntime.Must(clientgoscheme.AddToScheme(scheme))
	utilruntime.Must(jobset.AddToScheme(scheme))
	manager, err := ctrl.NewManager(config, ctrl.Options{
		Scheme:        scheme,
		Metrics:       metricsserver.Options{BindAddress: "0"},
		WebhookServer: webhook.NewServer(webhook.Options{Host: "127.0.0.1", Port: *port, CertDir: *folder}),
	})
	if err != nil {
		return err
	}
	ctx := ctrl.SetupSignalHandler()
	if err := controllers.SetupJobSetIndexes(ctx, manager.GetFieldIndexer()); err != nil {
		return err
	}
	events := manager.GetEventRecorder("jobset")
	reconciler := controllers.NewJobSetReconciler(manager.GetClient(), manager.GetScheme(), events)
	if err := reconciler.SetupWithManager(manager); err != nil {
		return err
	}
	if err := webhooks.Setup(manager); err != nil {
		return err
	}
	return manager.Start(ctx)
}
