package main

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"k8s.io/client-go/util/keyutil"
)

// Names inside the home directory, which is also the working directory: a Unix socket's path may have only about 100
// bytes, and a relative one is always short enough.
const (
	etcdDir        = "etcd"
	etcdSocket     = "etcd.sock"
	certDir        = "tls"
	tokensFile     = "tokens.csv"
	signingKey     = "service-account.key"
	kubeconfigFile = "kubeconfig"
	lockFile       = "lock"
)

// home is the directory that outlives a restart.
type home struct {
	root  string // absolute
	token string // the cluster administrator's
	lock  *os.File
}

// openHome creates what is missing, makes the directory the process's own and its working directory. It fails when
// another process runs on it.
func openHome(dir string) (*home, error) {
	root, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, err
	}
	if err := errors.Join(os.Chmod(root, 0o700), os.Chdir(root)); err != nil {
		return nil, err
	}
	lock, err := os.OpenFile(lockFile, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return nil, fmt.Errorf("another control plane runs on %s: %w", root, err)
	}
	h := &home{root: root, lock: lock}
	if h.token, err = administratorToken(); err != nil {
		return nil, err
	}
	return h, createOnce(signingKey, keyutil.MakeEllipticPrivateKeyPEM)
}

func (h *home) close() { _ = h.lock.Close() }

func (h *home) path(name string) string { return filepath.Join(h.root, name) }

// administratorToken reads the token from the API server's token file (token,user,uid,group), made at the first start.
func administratorToken() (string, error) {
	err := createOnce(tokensFile, func() ([]byte, error) {
		return []byte(rand.Text() + ",admin,admin,system:masters\n"), nil
	})
	if err != nil {
		return "", err
	}
	line, err := os.ReadFile(tokensFile)
	token, _, _ := strings.Cut(string(line), ",")
	return token, err
}

// writeKubeconfig writes the administrator's kubeconfig, which needs no other file, and returns its path.
func (h *home) writeKubeconfig(client *rest.Config) (string, error) {
	const name = "local"
	config := clientcmdapi.NewConfig()
	config.Clusters[name] = &clientcmdapi.Cluster{
		Server: client.Host, CertificateAuthorityData: client.CAData,
	}
	config.AuthInfos[name] = &clientcmdapi.AuthInfo{Token: h.token}
	config.Contexts[name] = &clientcmdapi.Context{Cluster: name, AuthInfo: name, Namespace: "default"}
	config.CurrentContext = name
	content, err := clientcmd.Write(*config)
	if err != nil {
		return "", err
	}
	return h.path(kubeconfigFile), replace(kubeconfigFile, content)
}

// createOnce writes a private file unless it exists.
func createOnce(name string, content func() ([]byte, error)) error {
	if _, err := os.Stat(name); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	made, err := content()
	if err != nil {
		return err
	}
	return replace(name, made)
}

// replace writes a private file so that it is seen whole or not at all.
func replace(name string, content []byte) error {
	draft := name + ".new"
	if err := os.Remove(draft); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err // an old draft would keep its own mode
	}
	if err := os.WriteFile(draft, content, 0o600); err != nil {
		return err
	}
	return os.Rename(draft, name)
}
