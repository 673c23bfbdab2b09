package mos_test

import (
	"context"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/mongoose-os/mos/common/mgrpc"
	"github.com/mongoose-os/mos/common/mgrpc/codec"
	"github.com/mongoose-os/mos/common/mgrpc/frame"
	"github.com/spf13/pflag"
	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/rpcjson"
)

// creds sets the client's flag --rpc-creds until the test ends.
func creds(t *testing.T, value string) {
	t.Helper()
	require.NoError(t, pflag.CommandLine.Parse([]string{"--rpc-creds=" + value}))
	t.Cleanup(func() { require.NoError(t, pflag.CommandLine.Parse([]string{"--rpc-creds="})) })
}

// access returns who may do what on a device with users admin and reader, the
// passwords of both being secret.
func access(t *testing.T, a rpcjson.Algorithm) *rpcjson.Access {
	t.Helper()
	var lines []string
	for _, user := range []string{"admin", "reader"} {
		line, err := rpcjson.HashPassword(a, user, "RPC", "secret")
		require.NoError(t, err)
		lines = append(lines, line)
	}
	p, err := rpcjson.ParsePasswords(strings.NewReader(strings.Join(lines, "\n")), "RPC")
	require.NoError(t, err)
	acc, err := rpcjson.NewAccess(rpcjson.AccessOptions{
		Passwords: p,
		Rights:    map[string][]rpcjson.Right{"admin": {rpcjson.Read, rpcjson.Operate, rpcjson.Install}, "reader": {rpcjson.Read}},
	})
	require.NoError(t, err)
	return acc
}

// The client logs in with digest over HTTP, by both algorithms, pushes a whole
// firmware and commits it, and is refused as it expects without the right password
// or right.
func TestAuth(t *testing.T) {
	for _, a := range []rpcjson.Algorithm{rpcjson.MD5, rpcjson.SHA256} {
		t.Run(string(a), func(t *testing.T) {
			d := newRig(t, rigOptions{auth: access(t, a)})
			refused := func(method, params, want string) {
				t.Helper()
				_, err := d.call(method, params)
				require.ErrorContains(t, err, want)
			}
			refused("OTA.Status", "", "credentials required but none provided")
			creds(t, "admin:wrong")
			refused("OTA.Status", "", "authentication failed")
			creds(t, "nobody:secret")
			refused("OTA.Status", "", "authentication failed")
			creds(t, "reader:secret")
			require.Equal(t, committed0, d.must("OTA.GetBootState", ""))
			d.refused("OTA.Commit", "", "remote error 403: unauthorized")
			d.refused("OTA.Begin", "{}", "remote error 403: unauthorized")
			require.Error(t, d.push(recorded(t, "small.zip")))
			require.Equal(t, 1, d.bootCount())
			d.requireFactory()

			file := filepath.Join(t.TempDir(), "creds")
			require.NoError(t, os.WriteFile(file, []byte("admin:secret\n"), 0o600))
			creds(t, "@"+file)
			require.NoError(t, d.push(recorded(t, "small.zip")))
			h := d.afterBoot(2)
			require.EqualValues(t, 1, h.Slot)
			require.Equal(t, "null", d.must("OTA.Commit", ""))
			require.Equal(t, committed1, d.must("OTA.GetBootState", ""))
		})
	}
}

// pipe is a codec of the client that hands each frame to a server, as WebSocket,
// serial lines and MQTT do in the end.
type pipe struct {
	srv     *rpcjson.Server
	replies chan *frame.Frame
	closed  chan struct{}
	close   func() // may be called again
}

func (p *pipe) Recv(context.Context) (*frame.Frame, error) {
	select {
	case f := <-p.replies:
		return f, nil
	case <-p.closed:
		return nil, io.EOF
	}
}

func (p *pipe) Send(ctx context.Context, f *frame.Frame) error {
	b, err := frame.MarshalJSON(f)
	if err != nil {
		return err
	}
	b, err = p.srv.Call(ctx, rpcjson.Peer{Channel: "UART"}, b)
	if err != nil {
		return err
	}
	var reply frame.Frame
	if err := json.Unmarshal(b, &reply); err != nil {
		return err
	}
	p.replies <- &reply
	return nil
}

func (p *pipe) Close()                          { p.close() }
func (p *pipe) CloseNotify() <-chan struct{}    { return p.closed }
func (p *pipe) MaxNumFrames() int               { return -1 }
func (p *pipe) Info() codec.ConnectionInfo      { return codec.ConnectionInfo{} }
func (p *pipe) SetOptions(*codec.Options) error { return nil }

// In frames the client answers the challenge in the reply, each time a new one.
func TestAuthInFrames(t *testing.T) {
	for _, a := range []rpcjson.Algorithm{rpcjson.MD5, rpcjson.SHA256} {
		srv, err := rpcjson.New(new(ota.Device), rpcjson.Options{ID: "esp32_123456", Authorizer: access(t, a)})
		require.NoError(t, err)
		closed := make(chan struct{})
		c := mgrpc.Serve(t.Context(), &pipe{srv, make(chan *frame.Frame, 1), closed, sync.OnceFunc(func() { close(closed) })})
		call := func(user, password, method string) (int, string) {
			t.Helper()
			res, err := c.Call(t.Context(), "", &frame.Command{Cmd: method}, func() (string, string, error) { return user, password, nil })
			require.NoError(t, err)
			return res.Status, res.StatusMsg
		}
		for range 20 {
			status, _ := call("reader", "secret", "RPC.List")
			require.Zero(t, status)
			status, text := call("reader", "secret", "OTA.Begin")
			require.Equal(t, 403, status)
			require.Equal(t, "unauthorized", text)
		}
		for _, user := range []string{"admin", "nobody"} {
			status, text := call(user, "wrong", "RPC.List")
			require.Equal(t, 401, status)
			require.Contains(t, text, `{"auth_type": "digest", "nonce": `)
		}
		require.NoError(t, c.Disconnect(t.Context()))
		require.NoError(t, srv.Close())
	}
}
