package main

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"net/url"
	"strings"

	"github.com/slotota/ota"
	"github.com/slotota/ota/rpcjson"
	"github.com/slotota/ota/rpcjson/mqtt"
	"github.com/slotota/ota/rpcjson/serial"
	"github.com/slotota/ota/rpcjson/ws"
)

// dialers are the transports to a device that package rpcjson does not have
// itself, by URL scheme.
func dialers() map[string]rpcjson.Dialer {
	return map[string]rpcjson.Dialer{
		"serial": serial.Dial,
		"ws":     dialWS,
		"wss":    dialWS,
		"mqtt":   dialMQTT,
		"mqtts":  dialMQTT,
	}
}

func dialWS(ctx context.Context, u *url.URL, o *rpcjson.ClientOptions) (rpcjson.Channel, error) {
	ch, err := ws.Dial(ctx, u.String(), &ws.DialOptions{Token: o.Token, TLS: tlsOf(o)})
	if err != nil {
		return nil, err
	}
	return ch, nil
}

// dialMQTT leaves the credentials in the URL: they are for the broker.
func dialMQTT(ctx context.Context, u *url.URL, o *rpcjson.ClientOptions) (rpcjson.Channel, error) {
	ch, err := mqtt.Dial(ctx, u.String(), &mqtt.DialOptions{TLS: tlsOf(o)})
	if err != nil {
		return nil, err
	}
	return ch, nil
}

// tlsOf returns what -ca and -cert say, nil if they are not given.
func tlsOf(o *rpcjson.ClientOptions) *tls.Config {
	if o.HTTPClient == nil {
		return nil
	}
	return o.HTTPClient.Transport.(*http.Transport).TLSClientConfig
}

// deviceURLs are the URLs that name a device, for people.
const deviceURLs = "http://HOST[:PORT], https://HOST, ws://HOST, wss://HOST, mqtt://[USER:PASSWORD@]BROKER/ID, mqtts://BROKER/ID, tcp://HOST:PORT, udp://HOST:PORT, serial:///dev/PORT[?baud=N], unix:///PATH (HTTP), rpc+unix:///PATH"

// service is a place where a simulated device can be reached.
type service struct {
	url   string // for clients, and to listen there again
	serve func(context.Context, *rpcjson.Server) error
	close func() error
}

// listenURL parses where to listen. Without scheme it is HTTP.
func listenURL(target string) (*url.URL, error) {
	if !strings.Contains(target, "://") {
		target = "http://" + target
	}
	u, err := url.Parse(target)
	if err == nil {
		switch u.Scheme {
		case "http", "tcp", "udp":
			_, _, err = net.SplitHostPort(u.Host)
			if u.Path != "" {
				err = errors.New("path")
			}
		case "mqtt", "mqtts":
			if u.Host == "" || u.Path != "" {
				err = errors.New("no broker")
			}
		case "unix", "rpc+unix", "serial":
			if u.Path == "" || u.Host != "" {
				err = errors.New("no path")
			}
		default:
			err = errors.New("scheme")
		}
	}
	if err != nil {
		if u != nil {
			target = u.Redacted()
		}
		return nil, usagef("-listen %s: need HOST:PORT, tcp://HOST:PORT, udp://HOST:PORT, mqtt://[USER:PASSWORD@]BROKER[:PORT], unix:///PATH, rpc+unix:///PATH or serial:///PATH", ota.Quote(target))
	}
	return u, nil
}

// exposed reports whether others than this machine can call at u.
func exposed(u *url.URL) bool {
	if u.Host == "" {
		return false
	}
	ip := net.ParseIP(u.Hostname())
	return u.Hostname() != "localhost" && (ip == nil || !ip.IsLoopback())
}

// listen opens the place u.
func listen(ctx context.Context, u *url.URL) (*service, error) {
	s := &service{}
	at := *u
	switch u.Scheme {
	case "mqtt", "mqtts":
		s.close = func() error { return nil }
		s.serve = func(ctx context.Context, srv *rpcjson.Server) error { return mqtt.Serve(ctx, srv, u.String(), nil) }
	case "serial":
		s.close = func() error { return nil }
		s.serve = func(ctx context.Context, srv *rpcjson.Server) error { return serial.Serve(ctx, srv, u.Path, nil) }
	case "udp":
		pc, err := net.ListenPacket("udp", u.Host)
		if err != nil {
			return nil, err
		}
		at.Host = pc.LocalAddr().String()
		s.close = pc.Close
		s.serve = func(ctx context.Context, srv *rpcjson.Server) error { return srv.ServePacket(ctx, pc, nil) }
	default:
		var l net.Listener
		var err error
		if u.Host == "" {
			l, err = rpcjson.ListenUnix(ctx, u.Path)
		} else if l, err = net.Listen("tcp", u.Host); err == nil {
			at.Host = l.Addr().String()
		}
		if errors.Is(err, ota.ErrBusy) {
			return nil, fail(exitBusy, "", "%s: another device listens there", u.Path)
		}
		if err != nil {
			return nil, err
		}
		s.close = l.Close
		s.serve = func(ctx context.Context, srv *rpcjson.Server) error { return srv.ServeListener(ctx, l, nil) }
		if u.Scheme == "http" || u.Scheme == "unix" {
			s.serve = func(ctx context.Context, srv *rpcjson.Server) error {
				h := ws.NewHandler(srv, nil)
				defer h.Close()
				mux := http.NewServeMux()
				mux.Handle("/", h)
				mux.Handle("/update", srv.UpdateHandler())
				mux.Handle("/update/", srv.UpdateHandler())
				web := rpcjson.NewHTTPServer(mux)
				defer context.AfterFunc(ctx, func() { web.Close() })()
				return web.Serve(l)
			}
		}
	}
	s.url = at.String()
	return s, nil
}
