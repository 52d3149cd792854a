package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/pflag"
	utilerrors "k8s.io/apimachinery/pkg/util/errors"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/kubernetes/cmd/kube-apiserver/app"
	"k8s.io/kubernetes/cmd/kube-apiserver/app/options"
)

const issuer = "https://kubernetes.default.svc"

var apiServerFlags = []string{
	"--bind-address=127.0.0.1",
	"--advertise-address=127.0.0.1", // otherwise it wants a default route
	"--endpoint-reconciler-type=none",
	"--etcd-servers=" + etcdURL.String(),
	"--cert-dir=" + certDir,
	"--token-auth-file=" + tokensFile,
	"--authorization-mode=RBAC",
	"--service-cluster-ip-range=10.0.0.0/24",
	"--service-account-issuer=" + issuer,
	"--api-audiences=" + issuer,
	"--service-account-key-file=" + signingKey,
	"--service-account-signing-key-file=" + signingKey,
	// Stop quickly: end the watches that are open, and give connections two seconds rather than a minute.
	"--shutdown-delay-duration=0s",
	"--shutdown-watch-termination-grace-period=1s",
	"--shutdown-send-retry-after=true",
}

type apiServer struct {
	client  *rest.Config  // the administrator's
	stopped chan struct{} // closed when it has stopped
	err     error         // why; to be read after stopped
	cancel  context.CancelFunc
}

// startAPIServer returns when /readyz says ok. The server outlives ctx, which only bounds the start; stop ends it.
func startAPIServer(ctx context.Context, h *home, port int) (*apiServer, error) {
	// Taken here rather than by the server: this knows how to pick a free port, and says which one was taken.
	listener, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		return nil, err
	}
	serving, cancel := context.WithCancel(context.Background())
	completed, err := completeOptions(serving, listener)
	if err != nil {
		cancel()
		return nil, err
	}
	certificate, err := os.ReadFile(filepath.Join(certDir, "apiserver.crt")) // with that of its CA
	if err != nil {
		cancel()
		return nil, err
	}
	server := &apiServer{
		client: &rest.Config{
			Host:            "https://" + listener.Addr().String(),
			BearerToken:     h.token,
			TLSClientConfig: rest.TLSClientConfig{CAData: certificate},
			QPS:             -1, // unlimited
		},
		stopped: make(chan struct{}),
		cancel:  cancel,
	}
	go func() {
		defer close(server.stopped)
		server.err = app.Run(serving, completed)
	}()
	if err := server.waitReady(ctx); err != nil {
		_ = server.stop()
		return nil, err
	}
	return server, nil
}

// completeOptions does what the kube-apiserver command does before it runs; the command itself would take the
// process's signals.
func completeOptions(ctx context.Context, listener net.Listener) (options.CompletedOptions, error) {
	opts := options.NewServerRunOptions()
	flags := pflag.NewFlagSet("kube-apiserver", pflag.ContinueOnError)
	for _, set := range opts.Flags().FlagSets {
		flags.AddFlagSet(set)
	}
	if err := flags.Parse(apiServerFlags); err != nil {
		return options.CompletedOptions{}, err
	}
	opts.SecureServing.Listener = listener
	opts.SecureServing.BindPort = listener.Addr().(*net.TCPAddr).Port
	if err := opts.GenericServerRunOptions.ComponentGlobalsRegistry.Set(); err != nil {
		return options.CompletedOptions{}, err
	}
	completed, err := opts.Complete(ctx)
	if err != nil {
		return options.CompletedOptions{}, err
	}
	return completed, utilerrors.NewAggregate(completed.Validate())
}

func (s *apiServer) waitReady(ctx context.Context) error {
	client, err := kubernetes.NewForConfig(s.client)
	if err != nil {
		return err
	}
	for {
		if client.Discovery().RESTClient().Get().AbsPath("/readyz").Do(ctx).Error() == nil {
			return nil
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-s.stopped:
			return s.err
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// stop drains the server and returns why it stopped, nil when it was because of this call.
func (s *apiServer) stop() error {
	s.cancel()
	<-s.stopped
	return s.err
}
