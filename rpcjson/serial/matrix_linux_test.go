package serial_test

import (
	"context"
	"io"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota/internal/authmatrix"
	"github.com/slotota/ota/rpcjson"
	"github.com/slotota/ota/rpcjson/serial"
)

// Who may call what over a real port.
func TestMatrix(t *testing.T) {
	authmatrix.Run(t, authmatrix.Transport{Name: "serial", Channel: "UART", Frames: func(t *testing.T, srv *rpcjson.Server, _ *authmatrix.PKI) func(authmatrix.Opening) (authmatrix.RoundTrip, error) {
		a, deviceName := openPTY(t)
		b, clientName := openPTY(t)
		ended := make(chan error, 3)
		go func() { _, err := io.Copy(a, b); ended <- err }()
		go func() { _, err := io.Copy(b, a); ended <- err }()
		ctx, cancel := context.WithCancel(context.Background())
		go func() { ended <- serial.Serve(ctx, srv, deviceName, nil) }()
		t.Cleanup(func() {
			cancel()
			a.Close()
			b.Close()
			for range 3 {
				<-ended
			}
		})
		return func(authmatrix.Opening) (authmatrix.RoundTrip, error) {
			ch, err := serial.NewChannel(clientName, nil)
			require.NoError(t, err)
			t.Cleanup(func() { require.NoError(t, ch.Close()) })
			return func(frame []byte) ([]byte, error) { return ch.RoundTrip(t.Context(), frame, 4096) }, nil
		}
	}})
}
