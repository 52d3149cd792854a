package main

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
)

const (
	finalizer     = "channels.hydracore.io/restore"
	channelNote   = "channels.hydracore.io/channel"
	uidNote       = "channels.hydracore.io/channel-uid"
	phoneNote     = "channels.hydracore.io/phone-number"
	accountNote   = "channels.hydracore.io/account-sid"
	recordLabel   = "channels.hydracore.io/record"
	managedLabel  = "app.kubernetes.io/managed-by"
	recordKey     = "record"
	webhookFormat = "https://sms.example.com/v1/instances/%s/channels/sms/webhook"
)

// Webhook is where Twilio sends a number's messages.
type Webhook struct {
	URL    string `json:"url"`
	Method string `json:"method"`
}

// Reconciler points the number of each channel at its instance, and back when the channel is deleted. Namespace has the
// records: one Secret per number, with the webhook before. Creating it claims the number.
type Reconciler struct {
	client.Client
	Namespace string
	Twilio    *Twilio
}

// Reconcile brings one channel to its desired state. It may run again after an error at any step.
func (r *Reconciler) Reconcile(ctx context.Context, request ctrl.Request) (ctrl.Result, error) {
	var channel SmsChannel
	if err := r.Get(ctx, request.NamespacedName, &channel); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	if !channel.DeletionTimestamp.IsZero() {
		return ctrl.Result{}, r.restore(ctx, &channel)
	}
	return ctrl.Result{}, r.configure(ctx, &channel)
}

func (r *Reconciler) configure(ctx context.Context, channel *SmsChannel) error {
	if channel.Status.ObservedGeneration == channel.Generation && meta.IsStatusConditionTrue(channel.Status.Conditions, "Ready") {
		return nil
	}
	if !controllerutil.ContainsFinalizer(channel, finalizer) {
		before := channel.DeepCopy()
		controllerutil.AddFinalizer(channel, finalizer)
		// The list of finalizers is replaced as a whole, so nobody may have changed it since it was read.
		if err := r.Patch(ctx, channel, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})); err != nil {
			return err
		}
	}
	number, err := r.Twilio.Find(ctx, channel.Spec.AccountSID, channel.Spec.PhoneNumber)
	if err != nil {
		return err
	}
	if err := r.claim(ctx, channel, number); err != nil {
		return err
	}
	webhook := Webhook{URL: fmt.Sprintf(webhookFormat, channel.Name), Method: "POST"}
	if err := r.Twilio.SetWebhook(ctx, channel.Spec.AccountSID, number.SID, webhook); err != nil {
		return err
	}
	return r.report(ctx, channel, number, webhook)
}

// claim creates the record of a number. It fails if another channel has it.
func (r *Reconciler) claim(ctx context.Context, channel *SmsChannel, number *Number) error {
	content, err := json.Marshal(Webhook{URL: number.SmsURL, Method: number.SmsMethod})
	if err != nil {
		return err
	}
	record := r.recordOf(number.SID)
	record.Labels = map[string]string{managedLabel: "sms-channel-operator", recordLabel: "true"}
	record.Annotations = map[string]string{
		channelNote: channel.Namespace + "/" + channel.Name,
		uidNote:     string(channel.UID),
		phoneNote:   channel.Spec.PhoneNumber,
		accountNote: channel.Spec.AccountSID,
	}
	record.Data = map[string][]byte{recordKey: content}
	err = r.Create(ctx, record)
	if !apierrors.IsAlreadyExists(err) {
		return err
	}
	if err := r.Get(ctx, client.ObjectKeyFromObject(record), record); err != nil {
		return err
	}
	if record.Annotations[uidNote] != string(channel.UID) {
		return fmt.Errorf("%s already serves another channel", channel.Spec.PhoneNumber)
	}
	return nil
}

func (r *Reconciler) report(ctx context.Context, channel *SmsChannel, number *Number, webhook Webhook) error {
	before := channel.DeepCopy()
	status := &channel.Status
	status.ObservedGeneration = channel.Generation
	status.PhoneNumberSID, status.WebhookURL = number.SID, webhook.URL
	for _, kind := range []string{"Ready", "CredentialsValid", "WebhookEffective"} {
		meta.SetStatusCondition(&status.Conditions, metav1.Condition{
			Type:               kind,
			Status:             metav1.ConditionTrue,
			Reason:             "Configured",
			Message:            "Twilio delivers this number's messages to the instance's webhook.",
			ObservedGeneration: channel.Generation,
		})
	}
	return r.Status().Patch(ctx, channel, client.MergeFrom(before))
}

func (r *Reconciler) restore(ctx context.Context, channel *SmsChannel) error {
	if !controllerutil.ContainsFinalizer(channel, finalizer) {
		return nil
	}
	if err := r.release(ctx, channel); err != nil {
		return err
	}
	before := channel.DeepCopy()
	controllerutil.RemoveFinalizer(channel, finalizer)
	patch := client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})
	return client.IgnoreNotFound(r.Patch(ctx, channel, patch))
}

// release restores the number's webhook and deletes its record. Without a record there is nothing to restore.
func (r *Reconciler) release(ctx context.Context, channel *SmsChannel) error {
	account, sid := channel.Spec.AccountSID, channel.Status.PhoneNumberSID
	if sid == "" { // deleted before the status was written
		number, err := r.Twilio.Find(ctx, account, channel.Spec.PhoneNumber)
		if err != nil {
			return err
		}
		sid = number.SID
	}
	record := r.recordOf(sid)
	if err := r.Get(ctx, client.ObjectKeyFromObject(record), record); err != nil {
		return client.IgnoreNotFound(err)
	}
	if record.Annotations[uidNote] != string(channel.UID) {
		return nil
	}
	var previous Webhook
	if err := json.Unmarshal(record.Data[recordKey], &previous); err != nil {
		return err
	}
	number, err := r.Twilio.Fetch(ctx, account, sid)
	if err != nil {
		return err
	}
	if number.SmsURL == fmt.Sprintf(webhookFormat, channel.Name) { // else somebody changed it meanwhile: it stays
		if err := r.Twilio.SetWebhook(ctx, account, sid, previous); err != nil {
			return err
		}
	}
	return client.IgnoreNotFound(r.Delete(ctx, record, client.Preconditions{ResourceVersion: &record.ResourceVersion}))
}

func (r *Reconciler) recordOf(sid string) *corev1.Secret {
	return &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: strings.ToLower(sid), Namespace: r.Namespace}}
}
