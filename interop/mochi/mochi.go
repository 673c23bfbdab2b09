// Package mochi starts the MQTT broker github.com/mochi-mqtt/server for tests.
package mochi

import (
	"log/slog"
	"testing"

	mqttserver "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/hooks/auth"
	"github.com/mochi-mqtt/server/v2/listeners"
	"github.com/mochi-mqtt/server/v2/packets"
	"github.com/stretchr/testify/require"
)

// Start returns a broker that lets everybody in, and its address (host:port). The
// caller closes it.
func Start(t testing.TB, o *mqttserver.Options) (*mqttserver.Server, string) {
	t.Helper()
	o.Logger = slog.New(slog.DiscardHandler)
	s := mqttserver.New(o)
	require.NoError(t, s.AddHook(new(auth.AllowHook), nil))
	l := &listener{listeners.NewTCP(listeners.Config{ID: "t", Address: "127.0.0.1:0"}), s}
	require.NoError(t, s.AddListener(l))
	require.NoError(t, s.Serve())
	return s, l.Address()
}

// listener is a listener that collects the clients to close by itself: up to 2.7.9,
// Clients.GetByListener takes its read lock twice, and hangs for ever if a client
// leaves in between.
type listener struct {
	*listeners.TCP
	s *mqttserver.Server
}

// Close implements listeners.Listener.
func (l *listener) Close(listeners.CloseFn) {
	l.TCP.Close(func(id string) {
		for _, c := range l.s.Clients.GetAll() {
			if c.Net.Listener == id && !c.Closed() {
				_ = l.s.DisconnectClient(c, packets.ErrServerShuttingDown)
			}
		}
	})
}
