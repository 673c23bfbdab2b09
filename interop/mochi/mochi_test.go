package mochi

import (
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"

	mqttserver "github.com/mochi-mqtt/server/v2"
	"github.com/stretchr/testify/require"
)

// A broker closes its clients and itself while others come and go, who write to
// the table of clients.
func TestClose(t *testing.T) {
	for range 20 {
		s, addr := Start(t, new(mqttserver.Options))
		c, err := net.Dial("tcp", addr)
		require.NoError(t, err)
		_, err = c.Write([]byte{0x10, 13, 0, 4, 'M', 'Q', 'T', 'T', 4, 2, 0, 60, 0, 1, 'a'}) // CONNECT
		require.NoError(t, err)
		ack := make([]byte, 4)
		_, err = io.ReadFull(c, ack)
		require.NoError(t, err)
		require.Equal(t, []byte{0x20, 2, 0, 0}, ack)

		var over atomic.Bool
		var others sync.WaitGroup
		for range 4 {
			others.Go(func() {
				for !over.Load() {
					s.Clients.Delete("another")
				}
			})
		}
		require.NoError(t, s.Close())
		over.Store(true)
		others.Wait()
		_, err = io.Copy(io.Discard, c)
		require.NoError(t, err, "closed")
		require.NoError(t, c.Close())
	}
}
