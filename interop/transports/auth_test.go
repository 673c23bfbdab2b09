package transports_test

import (
	"bytes"
	"context"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/spf13/pflag"
	"github.com/stretchr/testify/require"

	"github.com/slotota/ota/rpcjson"
	"github.com/slotota/ota/rpcjson/mqtt"
)

// creds sets the genuine client's flag --rpc-creds until the test ends.
func creds(t *testing.T, value string) {
	t.Helper()
	require.NoError(t, pflag.CommandLine.Parse([]string{"--rpc-creds=" + value}))
	t.Cleanup(func() { require.NoError(t, pflag.CommandLine.Parse([]string{"--rpc-creds="})) })
}

// withUsers lets admin do everything and reader look; the passwords of both are
// secret.
func withUsers(t *testing.T, a rpcjson.Algorithm) func(*rpcjson.Options) {
	t.Helper()
	var lines []string
	for _, user := range []string{"admin", "reader"} {
		line, err := rpcjson.HashPassword(a, user, "RPC", "secret")
		require.NoError(t, err)
		lines = append(lines, line)
	}
	p, err := rpcjson.ParsePasswords(strings.NewReader(strings.Join(lines, "\n")), "RPC")
	require.NoError(t, err)
	access, err := rpcjson.NewAccess(rpcjson.AccessOptions{
		Passwords: p,
		Rights:    map[string][]rpcjson.Right{"admin": {rpcjson.Read, rpcjson.Operate, rpcjson.Install}, "reader": {rpcjson.Read}},
	})
	require.NoError(t, err)
	return func(o *rpcjson.Options) { o.NoAuth, o.Authorizer = false, access }
}

// Passwords that the genuine client proves in each frame.
func testPasswords(t *testing.T, serve func(t *testing.T, d *device) (url string)) {
	for _, a := range []rpcjson.Algorithm{rpcjson.MD5, rpcjson.SHA256} {
		t.Run(string(a), func(t *testing.T) {
			d := newDevice(t, withUsers(t, a))
			url := serve(t, d)
			refused := func(method, want string) {
				t.Helper()
				_, err := genuine(t, url, deadline).CallRaw(t.Context(), method, nil)
				require.ErrorContains(t, err, want)
			}
			_, err := genuine(t, url, deadline).CallRaw(t.Context(), "OTA.Status", nil)
			require.Error(t, err, "no credentials")
			creds(t, "admin:wrong")
			refused("OTA.Status", "remote error 401: ")
			creds(t, "reader:secret")
			b, err := genuine(t, url, deadline).CallRaw(t.Context(), "OTA.Status", nil)
			require.NoError(t, err)
			require.Contains(t, string(b), `"state": 0`)
			refused("OTA.Commit", "remote error 403: unauthorized")
			require.ErrorContains(t, genuinePush(t, genuine(t, url, deadline), smallZip, 512), "remote error 403: unauthorized")

			creds(t, "admin:secret")
			everyMethod(t, genuine(t, url, deadline), d)

			d = newDevice(t, withUsers(t, a))
			require.NoError(t, genuinePush(t, genuine(t, serve(t, d), deadline), smallZip, 512))
			d.installed()
		})
	}
}

func TestWSPasswords(t *testing.T) {
	testPasswords(t, func(t *testing.T, d *device) string { return "ws://" + serveWS(t, d) + "/rpc" })
}

func TestMQTTPasswords(t *testing.T) {
	brokers(t, func(t *testing.T, addr string) {
		stop := func() {}
		testPasswords(t, func(t *testing.T, d *device) string {
			stop() // the one before has the same id
			stop = d.serve("mqtt://"+addr, mqtt.ServeOptions{})
			url := "mqtt://" + addr + "/" + deviceID
			online(t, dialMQTT(t, url, nil, &rpcjson.ClientOptions{User: "reader", Password: "secret"}))
			return url
		})
	})
}

// The genuine client never hears again from a device once its connection was lost in
// the middle of a push. The next one is told what to do, and succeeds.
func TestWSPushLost(t *testing.T) {
	d := newDevice(t, nil)
	addr := serveWS(t, d)
	var cut atomic.Bool
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	lossy := frameWay(t, addr, func(f wsFrame) []wsFrame {
		if bytes.Contains(f.payload, []byte(`"offset":1024,`)) && cut.CompareAndSwap(false, true) {
			cancel()
			return []wsFrame{{head: 0xf0}} // whoever gets that ends the connection
		}
		return []wsFrame{f}
	})
	require.Error(t, genuinePushUntil(ctx, t, genuine(t, "ws://"+lossy+"/rpc", deadline), smallZip, 512))
	require.True(t, cut.Load())
	conn := genuine(t, "ws://"+addr+"/rpc", deadline)
	require.ErrorContains(t, genuinePush(t, conn, smallZip, 512), "update is already in progress (1), call OTA.End")
	// Until the device has noticed that the first connection is gone, the session is
	// another client's.
	endCtx, stop := context.WithTimeout(t.Context(), deadline)
	defer stop()
	_, err := conn.CallRaw(endCtx, "OTA.End", nil)
	for err != nil && endCtx.Err() == nil && strings.Contains(err.Error(), "belongs to another client") {
		_, err = conn.CallRaw(endCtx, "OTA.End", nil)
	}
	require.ErrorContains(t, err, "Unexpected end of data")
	require.NoError(t, genuinePush(t, conn, smallZip, 512))
	d.installed()
}
