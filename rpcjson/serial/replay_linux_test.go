package serial_test

import (
	"context"
	"fmt"
	"hash/crc32"
	"io"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota/internal/replay"
	"github.com/slotota/ota/rpcjson"
	"github.com/slotota/ota/rpcjson/serial"
)

// What was recorded on any transport, over a real port.
func TestReplay(t *testing.T) {
	replay.Run(t, "../testdata", replay.Transport{Name: "serial", Lines: true, Serve: func(t *testing.T, srv *rpcjson.Server) func() (replay.Conn, error) {
		line, name := openPTY(t)
		opened := make(chan struct{})
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		go func() {
			ended <- serial.Serve(ctx, srv, name, &serial.Options{Open: func(name string, o *serial.Options) (io.ReadWriteCloser, error) {
				defer close(opened)
				return serial.Open(name, o)
			}})
		}()
		t.Cleanup(func() {
			cancel()
			require.ErrorIs(t, <-ended, context.Canceled)
		})
		return func() (replay.Conn, error) {
			<-opened // before that the line would echo
			return &replay.Stream{RW: line, Before: "\n\"\"\"", After: "\"\"\"\n", CRC: func(frame []byte) string {
				return fmt.Sprintf("%08x", crc32.ChecksumIEEE(frame))
			}}, line.SetDeadline(time.Now().Add(replay.Timeout))
		}
	}})
}
