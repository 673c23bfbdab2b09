package transports_test

import (
	"bytes"
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota/internal/authmatrix"
	"github.com/slotota/ota/rpcjson"
	"github.com/slotota/ota/rpcjson/mqtt"
)

// Who may call what through a broker, where only frames have credentials.
func TestMQTTMatrix(t *testing.T) {
	brokers(t, func(t *testing.T, addr string) {
		authmatrix.Run(t, authmatrix.Transport{Name: "MQTT", Channel: "MQTT", Frames: func(t *testing.T, srv *rpcjson.Server, _ *authmatrix.PKI) func(authmatrix.Opening) (authmatrix.RoundTrip, error) {
			ctx, cancel := context.WithCancel(context.Background())
			ended := make(chan error, 1)
			go func() { ended <- mqtt.Serve(ctx, srv, "mqtt://"+addr, nil) }()
			t.Cleanup(func() {
				cancel()
				<-ended
			})
			return func(authmatrix.Opening) (authmatrix.RoundTrip, error) {
				ch, err := mqtt.Dial(t.Context(), "mqtt://"+addr+"/device", nil)
				require.NoError(t, err)
				t.Cleanup(func() { require.NoError(t, ch.Close()) })
				src, _ := ch.Addresses()
				call := func(ctx context.Context, frame []byte) ([]byte, error) {
					return ch.RoundTrip(ctx, bytes.Replace(frame, []byte(`"src":"matrix"`), []byte(`"src":"`+src+`"`), 1), 4096)
				}
				id := time.Now().UnixNano() // new frames, or they would be taken for copies
				require.Eventually(t, func() bool {
					ctx, cancel := context.WithTimeout(t.Context(), time.Second)
					defer cancel()
					id++
					_, err := call(ctx, fmt.Appendf(nil, `{"src":"matrix","id":%d,"method":"Nope"}`, id))
					return err == nil
				}, deadline, poll, "the device is not there")
				return func(frame []byte) ([]byte, error) { return call(t.Context(), frame) }, nil
			}
		}})
	})
}
