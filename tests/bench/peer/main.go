// Command peer is the anchor of the speed benchmark: an operator for SmsChannels written in Go with controller-runtime,
// as its documentation recommends. For a new channel and for a deletion it makes the calls that the measured operator
// makes, in the same order.
//
// It does only what the benchmark measures. It unseals and seals nothing: the accounts' tokens come from a file, and its
// records are plain. It has no drift checks, credentials in Secrets, conflicts, token rotation or limits of its own.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"net/http"
	"os"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/log/zap"
	"sigs.k8s.io/controller-runtime/pkg/metrics/server"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
)

type options struct {
	workers           int
	channelNamespace  string
	operatorNamespace string
	twilioURL         string
	accounts          string
}

func main() {
	var o options
	flag.IntVar(&o.workers, "workers", 64, "how many channels are reconciled at a time")
	flag.StringVar(&o.channelNamespace, "channel-namespace", "sms-channels", "where the channels are")
	flag.StringVar(&o.operatorNamespace, "operator-namespace", "sms-operator", "where the records are")
	flag.StringVar(&o.twilioURL, "twilio-url", "https://api.twilio.com", "where Twilio is")
	flag.StringVar(&o.accounts, "accounts", "", "file with the accounts' tokens: a JSON object from SID to token")
	// controller-runtime adds the flag -kubeconfig; without it, $KUBECONFIG counts.
	flag.Parse()
	ctrl.SetLogger(zap.New())
	if err := run(o); err != nil {
		fmt.Fprintln(os.Stderr, "peer:", err)
		os.Exit(1)
	}
}

func run(o options) error {
	tokens, err := readTokens(o.accounts)
	if err != nil {
		return err
	}
	config, err := ctrl.GetConfig()
	if err != nil {
		return err
	}
	config.QPS = -1 // no limit in the client; its default is 20 calls a second
	scheme := runtime.NewScheme()
	if err := corev1.AddToScheme(scheme); err != nil {
		return err
	}
	if err := addToScheme(scheme); err != nil {
		return err
	}
	manager, err := ctrl.NewManager(config, ctrl.Options{
		Scheme:  scheme,
		Metrics: server.Options{BindAddress: "0"},
		Cache:   cache.Options{DefaultNamespaces: map[string]cache.Config{o.channelNamespace: {}}},
		// Records are read from the API server, never from a cache that may be behind.
		Client: client.Options{Cache: &client.CacheOptions{DisableFor: []client.Object{&corev1.Secret{}}}},
	})
	if err != nil {
		return err
	}
	reconciler := &Reconciler{
		Client:    manager.GetClient(),
		Namespace: o.operatorNamespace,
		Twilio: &Twilio{
			URL:    o.twilioURL,
			Tokens: tokens,
			HTTP:   &http.Client{Transport: newTransport(o.workers), Timeout: callTimeout},
		},
	}
	err = ctrl.NewControllerManagedBy(manager).
		// A status that was written, or a finalizer, is no news; a spec or a deletion is.
		For(&SmsChannel{}, builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		WithOptions(controller.Options{MaxConcurrentReconciles: o.workers}).
		Complete(reconciler)
	if err != nil {
		return err
	}
	return manager.Start(ctrl.SetupSignalHandler())
}

func readTokens(path string) (map[string]string, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var tokens map[string]string
	if err := json.Unmarshal(content, &tokens); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return tokens, nil
}
