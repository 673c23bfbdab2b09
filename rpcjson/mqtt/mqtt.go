// Package mqtt carries the calls of package rpcjson over an MQTT 3.1.1 broker, with
// the library github.com/eclipse/paho.mqtt.golang.
//
// A device serves the calls that come to the topics ID/rpc and ID/rpc/METHOD:
//
//	err := mqtt.Serve(ctx, srv, "mqtts://broker.example", nil) // srv is a *rpcjson.Server
//
// A client dials it by the broker and the id:
//
//	ch, err := mqtt.Dial(ctx, "mqtts://user:secret@broker.example/esp32_123456", nil)
//	c := rpcjson.NewClient(ch, nil)
//
// Each message is one frame, sent with QoS 1 and not retained. The reply goes to
// SRC/rpc, where SRC is the member src of the request (mongoose-os-libs/rpc-mqtt,
// src/mgos_rpc_channel_mqtt.c; mongoose-os/mos, common/mgrpc/codec/mqtt.go).
//
// Whoever may publish to the topics of a device may call it, as far as its
// [rpcjson.Authorizer] allows; that sees the channel MQTT, and no HTTP request. It
// is the broker that knows who publishes. Let it allow each topic to those who
// need it, and use mqtts: without TLS whoever listens can read the password, the
// firmware and all calls.
package mqtt

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/slotota/ota"
)

// DialOptions say how to connect to the broker. The zero value is safe.
type DialOptions struct {
	// Username and Password are the credentials for the broker; both empty means
	// those in the URL, if any.
	Username, Password string
	// ClientID is the name for the broker, which lets nobody else of that name
	// stay connected. "" means the id of the device for Serve, and a random one
	// for Dial.
	ClientID string
	// TLS is used for mqtts URLs; nil trusts the certificates of the system.
	TLS *tls.Config
	// DialContext opens the connection; nil means a [net.Dialer] with a time
	// limit. Proxies from the environment are not used.
	DialContext func(ctx context.Context, network, addr string) (net.Conn, error)
}

// broker is where to connect to, and as whom.
type broker struct {
	addr               string // with port
	tls                *tls.Config
	username, password string
	clientID           string
	dial               func(ctx context.Context, network, addr string) (net.Conn, error)
}

// newBroker decodes a URL; path is what stands in it after the host, without the
// slash. The error wraps ota.ErrInvalid.
func newBroker(rawURL string, o *DialOptions) (b *broker, path string, err error) {
	u, err := url.Parse(rawURL)
	if err != nil {
		return nil, "", fmt.Errorf("mqtt: not a URL: %w", ota.ErrInvalid) // the error of Parse quotes all of it
	}
	b = &broker{username: o.Username, password: o.Password, clientID: o.ClientID, dial: o.DialContext}
	port := "1883"
	switch u.Scheme {
	case "mqtt":
	case "mqtts":
		port = "8883"
		b.tls = &tls.Config{}
		if o.TLS != nil {
			b.tls = o.TLS.Clone()
		}
		if b.tls.ServerName == "" {
			b.tls.ServerName = u.Hostname()
		}
	default:
		return nil, "", fmt.Errorf("mqtt: URL scheme %s: need mqtt or mqtts: %w", ota.Quote(u.Scheme), ota.ErrInvalid)
	}
	if u.Hostname() == "" {
		return nil, "", fmt.Errorf("mqtt: URL without a host: %w", ota.ErrInvalid)
	}
	if strings.ContainsAny(rawURL, "?#") {
		return nil, "", fmt.Errorf("mqtt: URL with a query or a fragment: %w", ota.ErrInvalid)
	}
	if p := u.Port(); p != "" {
		port = p
	}
	b.addr = net.JoinHostPort(u.Hostname(), port)
	if b.username == "" && b.password == "" && u.User != nil {
		b.username = u.User.Username()
		b.password, _ = u.User.Password()
	}
	for name, s := range map[string]string{"Username": b.username, "Password": b.password, "ClientID": b.clientID} {
		if len(s) > 65535 { // the length is sent in 16 bits
			return nil, "", fmt.Errorf("mqtt: %s: %d bytes, at most 65535: %w", name, len(s), ota.ErrInvalid)
		}
	}
	if b.dial == nil {
		b.dial = (&net.Dialer{Timeout: connectTimeout}).DialContext
	}
	return b, strings.TrimPrefix(u.Path, "/"), nil
}

// maxTopic bounds the parts of topics that come from outside, in bytes.
const maxTopic = 512

// checkTopic returns nil if s may be published to, followed by something else: it
// has no wildcards, and is not one of the broker's own (MQTT 3.1.1, section 4.7).
func checkTopic(s string) error {
	switch {
	case s == "":
		return errors.New("empty")
	case len(s) > maxTopic:
		return fmt.Errorf("%d bytes, at most %d", len(s), maxTopic)
	case s[0] == '$':
		return errors.New("begins with $")
	case strings.ContainsAny(s, "+#"):
		return errors.New("has a wildcard")
	case !utf8.ValidString(s) || strings.ContainsFunc(s, unicode.IsControl):
		return errors.New("has control characters")
	}
	return nil
}
