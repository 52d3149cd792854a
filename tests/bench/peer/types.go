package main

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

var groupVersion = schema.GroupVersion{Group: "channels.hydracore.io", Version: "v1"}

func addToScheme(scheme *runtime.Scheme) error {
	scheme.AddKnownTypes(groupVersion, &SmsChannel{}, &SmsChannelList{})
	metav1.AddToGroupVersion(scheme, groupVersion)
	return nil
}

// SmsChannel has the fields of the resource that this operator reads or writes.
type SmsChannel struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   SmsChannelSpec   `json:"spec"`
	Status SmsChannelStatus `json:"status,omitempty"`
}

type SmsChannelSpec struct {
	AccountSID  string `json:"accountSid"`
	PhoneNumber string `json:"phoneNumber"`
}

type SmsChannelStatus struct {
	ObservedGeneration int64              `json:"observedGeneration,omitempty"`
	PhoneNumberSID     string             `json:"phoneNumberSid,omitempty"`
	WebhookURL         string             `json:"webhookUrl,omitempty"`
	Conditions         []metav1.Condition `json:"conditions,omitempty"`
}

type SmsChannelList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []SmsChannel `json:"items"`
}

func (c *SmsChannel) DeepCopyInto(out *SmsChannel) {
	*out = *c
	c.ObjectMeta.DeepCopyInto(&out.ObjectMeta)
	out.Status.Conditions = nil
	for i := range c.Status.Conditions {
		out.Status.Conditions = append(out.Status.Conditions, *c.Status.Conditions[i].DeepCopy())
	}
}

func (c *SmsChannel) DeepCopy() *SmsChannel {
	out := new(SmsChannel)
	c.DeepCopyInto(out)
	return out
}

func (c *SmsChannel) DeepCopyObject() runtime.Object { return c.DeepCopy() }

func (l *SmsChannelList) DeepCopyObject() runtime.Object {
	out := &SmsChannelList{TypeMeta: l.TypeMeta, ListMeta: *l.ListMeta.DeepCopy()}
	if l.Items != nil {
		out.Items = make([]SmsChannel, len(l.Items))
		for i := range l.Items {
			l.Items[i].DeepCopyInto(&out.Items[i])
		}
	}
	return out
}
