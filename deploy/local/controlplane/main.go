// Controlplane is a Kubernetes control plane in one process: etcd, kube-apiserver, the garbage collector and the
// namespace controller. There are no nodes, so pods are never run.
//
//	controlplane --dir DIR [--port N]
//
// Once everything is ready, one line of JSON goes to standard output:
//
//	{"url": "https://127.0.0.1:N", "kubeconfig": "DIR/kubeconfig", "etcdDir": "DIR/etcd"}
//
// The log goes to standard error. SIGTERM or SIGINT stops it in the reverse order of its start, with exit status 0.
// Everything it keeps is in DIR: started again with the same DIR and port, it carries on where it was, and tokens it has
// issued stay valid. Whoever can read DIR has the whole cluster, so DIR is closed to other users.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"k8s.io/klog/v2"
)

const startTimeout = 2 * time.Minute // it takes seconds; this is for a machine that is very busy

func main() {
	flags := flag.NewFlagSet("controlplane", flag.ExitOnError)
	dir := flags.String("dir", "", "directory that holds the data and the keys; created when missing")
	port := flags.Int("port", 0, "port of the API server on 127.0.0.1; 0 picks a free one")
	_ = flags.Parse(os.Args[1:]) // ExitOnError
	if *dir == "" || flags.NArg() > 0 {
		flags.Usage()
		os.Exit(2)
	}
	logOnly("ERROR")

	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer cancel()
	announce := os.Stdout
	os.Stdout = os.Stderr // the line of JSON is all that is ever printed; its reader may be gone by then
	if err := run(ctx, *dir, *port, announce); err != nil {
		fmt.Fprintln(os.Stderr, "controlplane:", err)
		os.Exit(1)
	}
}

// run starts everything, announces it on out, and returns when ctx is done (nil) or when a part fails.
func run(ctx context.Context, dir string, port int, out io.Writer) (err error) {
	home, err := openHome(dir)
	if err != nil {
		return err
	}
	defer home.close()

	// A signal is obeyed once everything has started: an API server that is stopped before aborts the process.
	starting, cancel := context.WithTimeoutCause(
		context.WithoutCancel(ctx), startTimeout, errors.New("not ready in time"))
	defer cancel()
	store, err := startEtcd(starting)
	if err != nil {
		return fmt.Errorf("etcd: %w", err)
	}
	defer store.stop()

	api, err := startAPIServer(starting, home, port)
	if err != nil {
		return fmt.Errorf("API server: %w", err)
	}
	defer func() { err = errors.Join(err, api.stop()) }()

	stopControllers, err := startControllers(starting, api.client)
	if err != nil {
		return fmt.Errorf("controllers: %w", err)
	}
	defer stopControllers()

	kubeconfig, err := home.writeKubeconfig(api.client)
	if err != nil {
		return err
	}
	if err := json.NewEncoder(out).Encode(map[string]string{
		"url": api.client.Host, "kubeconfig": kubeconfig, "etcdDir": home.path(etcdDir),
	}); err != nil {
		return err
	}

	select {
	case <-ctx.Done():
		logOnly("FATAL") // from here on every watch that ends is logged as an error
		return nil
	case <-api.stopped:
		return errors.New("the API server stopped by itself")
	case err := <-store.Err():
		return fmt.Errorf("etcd: %w", err)
	}
}

// logOnly keeps what is less severe out of the log. The Kubernetes libraries write thousands of lines of information
// and warnings.
func logOnly(severity string) {
	flags := flag.NewFlagSet("klog", flag.PanicOnError)
	klog.InitFlags(flags)
	_ = flags.Parse([]string{"-legacy_stderr_threshold_behavior=false", "-stderrthreshold=" + severity})
}
