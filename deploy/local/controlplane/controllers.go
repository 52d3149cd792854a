package main

import (
	"context"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/metadata/metadatainformer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/controller/garbagecollector"
	"k8s.io/kubernetes/pkg/controller/namespace"
)

const (
	discoveryPeriod = 2 * time.Second // a CRD is noticed by the garbage collector within this time; upstream: 30 s
	resyncPeriod    = 12 * time.Hour
	workers         = 20
)

// startControllers runs the garbage collector and the namespace controller, and returns when both have seen the whole
// cluster. The function returned stops them and waits for their end. They outlive ctx, which only bounds the start.
func startControllers(ctx context.Context, config *rest.Config) (stop func(), err error) {
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, err
	}
	objects, err := metadata.NewForConfig(config)
	if err != nil {
		return nil, err
	}
	running, cancel := context.WithCancel(context.Background())
	var group sync.WaitGroup
	stop = func() {
		cancel()
		group.Wait()
	}

	metadataInformers := metadatainformer.NewSharedInformerFactoryWithOptions(
		objects, resyncPeriod, metadatainformer.WithTransform(dropManagedFields))
	typedInformers := informers.NewSharedInformerFactory(client, resyncPeriod)
	namespaces := typedInformers.Core().V1().Namespaces()
	informersStarted := make(chan struct{})

	collector, err := garbagecollector.NewGarbageCollector(
		running, client, objects,
		restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(client.Discovery())),
		garbagecollector.DefaultIgnoredResources(), metadataOnly{metadataInformers}, informersStarted)
	if err != nil {
		cancel()
		return nil, err
	}
	namespaceController := namespace.NewNamespaceController(
		running, client, objects, client.Discovery().ServerPreferredNamespacedResources,
		namespaces, resyncPeriod, corev1.FinalizerKubernetes)

	group.Go(func() { collector.Run(running, workers, time.Minute) })
	group.Go(func() { collector.Sync(running, client.Discovery(), discoveryPeriod) })
	group.Go(func() { namespaceController.Run(running, workers) })
	typedInformers.Start(running.Done())
	metadataInformers.Start(running.Done())
	close(informersStarted)

	synced := func(context.Context) (bool, error) {
		return namespaces.Informer().HasSynced() && collector.IsSynced(klog.Background()), nil
	}
	if wait.PollUntilContextCancel(ctx, 50*time.Millisecond, true, synced) != nil {
		stop()
		return nil, context.Cause(ctx)
	}
	return stop, nil
}

// metadataOnly makes the garbage collector keep names and owners in memory, but no Secret's content.
type metadataOnly struct {
	metadatainformer.SharedInformerFactory
}

func (m metadataOnly) ForResource(resource schema.GroupVersionResource) (informers.GenericInformer, error) {
	return m.SharedInformerFactory.ForResource(resource), nil
}

func dropManagedFields(object any) (any, error) {
	if accessor, err := meta.Accessor(object); err == nil {
		accessor.SetManagedFields(nil)
	}
	return object, nil
}
