package serial_test

import (
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota/rpcjson"
	"github.com/slotota/ota/rpcjson/serial"
)

// After a megabyte of noise on a real port the client is served.
func TestPTYNoise(t *testing.T) {
	line, name := openPTY(t)
	var got bytes.Buffer
	srv := newServer(t, &got)
	opened := make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- serial.Serve(ctx, srv, name, &serial.Options{Open: func(name string, o *serial.Options) (io.ReadWriteCloser, error) {
			defer close(opened)
			return serial.Open(name, o)
		}})
	}()
	<-opened // before that the line would echo
	noise := make([]byte, 1<<20)
	_, err := rand.NewChaCha8([32]byte{7}).Read(noise)
	require.NoError(t, err)
	require.NoError(t, line.SetDeadline(time.Now().Add(2*time.Minute)))
	_, err = line.Write(append(noise, "{\"src\":\"x\",\"id\":9,\"met"...))
	require.NoError(t, err)
	c := rpcjson.NewClient(rpcjson.NewStreamOf(line, rpcjson.SerialStream()), nil)
	require.NoError(t, c.Call(t.Context(), "RPC.Ping", nil, nil))
	cancel()
	require.ErrorIs(t, <-ended, context.Canceled)
	_ = c.Close()
}
