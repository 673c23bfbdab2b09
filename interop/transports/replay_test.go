package transports_test

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota/internal/replay"
	"github.com/slotota/ota/rpcjson"
	"github.com/slotota/ota/rpcjson/mqtt"
)

// rawMQTT is a client that publishes what it is told to, whatever its source is
// said to be, and gets all replies.
type rawMQTT struct {
	net.Conn
	r      *bufio.Reader
	status string // topic
	id     uint16 // of the last message
}

func dialRaw(t *testing.T, addr, status string, topics ...string) *rawMQTT {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close() })
	require.NoError(t, conn.SetDeadline(time.Now().Add(replay.Timeout)))
	c := &rawMQTT{Conn: conn, r: bufio.NewReader(conn), status: status}
	id := fmt.Sprintf("raw%d", time.Now().UnixNano())
	body := append([]byte("\x00\x04MQTT\x04\x02\x00\x00\x00"), byte(len(id)))
	_, err = c.Write(packet{0x10, append(body, id...)}.wire())
	require.NoError(t, err)
	p, err := readPacket(c.r)
	require.NoError(t, err)
	require.Equal(t, []byte{0, 0}, p.body)
	body = []byte{0, 1}
	for _, topic := range append(topics, status) {
		body = append(append(append(body, 0, byte(len(topic))), topic...), 0)
	}
	_, err = c.Write(packet{0x82, body}.wire())
	require.NoError(t, err)
	p, err = readPacket(c.r)
	require.NoError(t, err)
	require.Equal(t, byte(0x90), p.head)
	return c
}

// Send implements replay.Conn, with QoS 1: the device may be connecting anew.
func (c *rawMQTT) Send(frame []byte) error {
	const topic = deviceID + "/rpc"
	body := append([]byte{0, byte(len(topic))}, topic...)
	c.id++
	body = append(body, byte(c.id>>8), byte(c.id))
	_, err := c.Write(packet{0x32, append(body, frame...)}.wire())
	return err
}

// Recv implements replay.Conn.
func (c *rawMQTT) Recv() ([]byte, error) {
	for {
		p, err := readPacket(c.r)
		if err != nil {
			return nil, err
		}
		if p.kind() == typePublish && p.topic() != c.status {
			return []byte(p.payload()), nil
		}
	}
}

// online waits until a device says so on the topic for its status.
func (c *rawMQTT) online() error {
	for {
		p, err := readPacket(c.r)
		if err != nil || p.kind() == typePublish && p.topic() == c.status && p.payload() == "online" {
			return err
		}
	}
}

// What was recorded on any transport, through brokers.
func TestMQTTReplay(t *testing.T) {
	brokers(t, func(t *testing.T, addr string) {
		replay.Run(t, "../../rpcjson/testdata", replay.Transport{Name: "MQTT", NeedsSrc: true, Serve: func(t *testing.T, srv *rpcjson.Server) func() (replay.Conn, error) {
			ctx, cancel := context.WithCancel(context.Background())
			ended := make(chan error, 1)
			// What the broker knows of the device before this one is on another topic.
			status := fmt.Sprintf("status/%d", time.Now().UnixNano())
			c := dialRaw(t, addr, status, "mos/rpc", deviceID+"/rpc-resp/+/rpc")
			go func() { ended <- mqtt.Serve(ctx, srv, "mqtt://"+addr, &mqtt.ServeOptions{StatusTopic: status}) }()
			t.Cleanup(func() {
				cancel()
				require.ErrorIs(t, <-ended, context.Canceled)
			})
			return func() (replay.Conn, error) { return c, c.online() }
		}})
	})
}
