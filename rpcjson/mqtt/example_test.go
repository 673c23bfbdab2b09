package mqtt_test

import (
	"context"
	"fmt"
	"log"
	"time"

	"github.com/slotota/ota/rpcjson"
	"github.com/slotota/ota/rpcjson/mqtt"
)

// A device serves until its program ends.
func ExampleServe() {
	serve := func(ctx context.Context, srv *rpcjson.Server) error {
		return mqtt.Serve(ctx, srv, "mqtts://broker.example", &mqtt.ServeOptions{
			Dial:        mqtt.DialOptions{Username: srv.ID(), Password: "from a safe place"},
			StatusTopic: srv.ID() + "/status",
		})
	}
	_ = serve
}

// A client asks a device for its boot state.
func ExampleDial() {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	ch, err := mqtt.Dial(ctx, "mqtts://operator:secret@broker.invalid/esp32_123456", nil)
	if err != nil {
		log.Fatal(err) // not a URL for this
	}
	c := rpcjson.NewClient(ch, nil)
	defer c.Close()
	if _, err := c.BootState(ctx); err != nil {
		fmt.Println("the broker cannot be reached")
	}
	// Output: the broker cannot be reached
}
