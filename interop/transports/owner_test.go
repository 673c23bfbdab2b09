package transports_test

import (
	"bytes"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota/rpcjson"
	"github.com/slotota/ota/rpcjson/mqtt"
)

// Over MQTT a push session belongs to the src that has begun it, over
// whatever connection.
func TestMQTTPushOwner(t *testing.T) {
	_, addr := startMochi(t)
	d := newDevice(t, nil)
	d.serve("mqtt://"+addr, mqtt.ServeOptions{})
	zip := readSmall(t)
	open := func(id string) *rpcjson.Client {
		c := dialMQTT(t, "mqtt://"+addr+"/"+deviceID, &mqtt.DialOptions{ClientID: id}, nil)
		online(t, c)
		return c
	}
	write := func(c *rpcjson.Client, off, end int) error {
		return c.Call(t.Context(), "OTA.Write", map[string]any{"offset": off, "data": zip[off:end]}, nil)
	}
	a, b := open("a"), open("b")
	require.NoError(t, a.Call(t.Context(), "OTA.Begin", map[string]int{"size": len(zip)}, nil))
	require.NoError(t, write(a, 0, 1000))
	var e *rpcjson.Error
	require.ErrorAs(t, write(b, 1000, 1500), &e)
	require.Equal(t, 503, e.Code)
	require.ErrorAs(t, b.Call(t.Context(), "OTA.End", nil, nil), &e)
	require.Equal(t, 503, e.Code)
	require.NoError(t, a.Close())
	again := open("a") // another connection, the same name
	require.NoError(t, again.Push(t.Context(), bytes.NewReader(zip), int64(len(zip)), &rpcjson.PushOptions{Resume: true}))
	d.installed()
}
