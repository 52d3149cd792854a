package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"
)

const (
	callTimeout = 15 * time.Second
	longestBody = 1 << 20
)

// Number is a phone number at Twilio, with the webhook that it has now.
type Number struct {
	SID       string `json:"sid"`
	SmsURL    string `json:"sms_url"`
	SmsMethod string `json:"sms_method"`
}

// Twilio calls Twilio's REST API. Tokens has each account's token by the account's SID.
type Twilio struct {
	URL    string
	Tokens map[string]string
	HTTP   *http.Client
}

func newTransport(connections int) *http.Transport {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConns, transport.MaxIdleConnsPerHost = connections, connections
	return transport
}

// Find returns the account's number. It fails if the account does not have it.
func (t *Twilio) Find(ctx context.Context, account, phoneNumber string) (*Number, error) {
	var page struct {
		Numbers []Number `json:"incoming_phone_numbers"`
	}
	query := url.Values{"PhoneNumber": {phoneNumber}}
	if err := t.call(ctx, http.MethodGet, account, ".json?"+query.Encode(), nil, &page); err != nil {
		return nil, err
	}
	if len(page.Numbers) != 1 {
		return nil, fmt.Errorf("account %s has %d numbers %s", account, len(page.Numbers), phoneNumber)
	}
	return &page.Numbers[0], nil
}

// Fetch returns the number with this SID.
func (t *Twilio) Fetch(ctx context.Context, account, sid string) (*Number, error) {
	var number Number
	if err := t.call(ctx, http.MethodGet, account, "/"+sid+".json", nil, &number); err != nil {
		return nil, err
	}
	return &number, nil
}

// SetWebhook sets where Twilio sends the number's messages.
func (t *Twilio) SetWebhook(ctx context.Context, account, sid string, to Webhook) error {
	form := url.Values{"SmsUrl": {to.URL}, "SmsMethod": {to.Method}}
	return t.call(ctx, http.MethodPost, account, "/"+sid+".json", form, &Number{})
}

func (t *Twilio) call(ctx context.Context, method, account, path string, form url.Values, into any) error {
	address := t.URL + "/2010-04-01/Accounts/" + account + "/IncomingPhoneNumbers" + path
	var body io.Reader
	if form != nil {
		body = strings.NewReader(form.Encode())
	}
	request, err := http.NewRequestWithContext(ctx, method, address, body)
	if err != nil {
		return err
	}
	request.SetBasicAuth(account, t.Tokens[account])
	if form != nil {
		request.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	response, err := t.HTTP.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	content, err := io.ReadAll(io.LimitReader(response.Body, longestBody))
	if err != nil {
		return err
	}
	if response.StatusCode >= 300 {
		return fmt.Errorf("Twilio answers HTTP %d to %s %s", response.StatusCode, method, request.URL.Path)
	}
	return json.Unmarshal(content, into)
}
