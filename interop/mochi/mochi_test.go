package mochi

import (
	"net"
	"sync"
	"testing"

	mqttserver "github.com/mochi-mqtt/server/v2"
	"github.com/stretchr/testify/require"
)

// A broker can be closed while its clients leave.
func TestClose(t *testing.T) {
	for range 50 {
		s, addr := Start(t, new(mqttserver.Options))
		var leave sync.WaitGroup
		for i := range 20 {
			c, err := net.Dial("tcp", addr)
			require.NoError(t, err)
			_, err = c.Write([]byte{0x10, 13, 0, 4, 'M', 'Q', 'T', 'T', 4, 2, 0, 60, 0, 1, 'a' + byte(i)}) // CONNECT
			require.NoError(t, err)
			var ack [4]byte
			_, err = c.Read(ack[:])
			require.NoError(t, err)
			require.Equal(t, [4]byte{0x20, 2, 0, 0}, ack)
			leave.Go(func() { c.Close() })
		}
		require.NoError(t, s.Close())
		leave.Wait()
	}
}
