package main

import (
	"context"
	"net/url"

	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
)

var etcdURL = url.URL{Scheme: "unix", Host: etcdSocket}

type etcd struct {
	*embed.Etcd
	quieten func() // a clean stop logs its closed listeners as errors
}

// startEtcd returns when etcd serves. It listens on a Unix socket in the home directory and nowhere else: etcd asks
// nobody who they are, and on a port every user of the machine could read the cluster's Secrets.
func startEtcd(ctx context.Context) (*etcd, error) {
	config := embed.NewConfig()
	config.Dir = etcdDir
	config.ListenPeerUrls = nil
	config.ListenClientUrls = []url.URL{etcdURL}
	config.EnableGRPCGateway = false
	config.UnsafeNoFsync = true // survives the death of the process, not of the machine
	logger, quieten, err := etcdLogger()
	if err != nil {
		return nil, err
	}
	config.ZapLoggerBuilder = embed.NewZapLoggerBuilder(logger)
	// A single member elects itself after this long.
	config.TickMs, config.ElectionMs = 10, 100
	// No follower will ever ask for old log entries, so do not keep thousands of them in memory.
	config.SnapshotCount, config.SnapshotCatchUpEntries = 1000, 10

	embedded, err := embed.StartEtcd(config)
	if err != nil {
		return nil, err
	}
	store := &etcd{embedded, quieten}
	select {
	case <-store.Server.ReadyNotify():
		return store, nil
	case err = <-store.Err():
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	store.stop()
	return nil, err
}

func (e *etcd) stop() {
	e.quieten()
	e.Close()
}

// etcdLogger logs errors only: the warnings are about slow disks and busy machines. quieten ends even that.
func etcdLogger() (logger *zap.Logger, quieten func(), err error) {
	config := zap.NewProductionConfig()
	config.Encoding = "console"
	config.DisableStacktrace = true
	config.Level.SetLevel(zap.ErrorLevel)
	logger, err = config.Build()
	return logger, func() { config.Level.SetLevel(zap.FatalLevel) }, err
}
