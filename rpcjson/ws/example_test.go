package ws_test

import (
	"context"
	"fmt"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"

	"github.com/slotota/ota"
	"github.com/slotota/ota/rpcjson"
	"github.com/slotota/ota/rpcjson/ws"
)

// A device that serves over HTTP and WebSocket, and a client.
func Example() {
	dev := new(ota.Device) // see ota.Open
	srv, err := rpcjson.New(dev, rpcjson.Options{ID: "esp32_123456", NoAuth: true})
	if err != nil {
		log.Fatal(err)
	}
	defer srv.Close()
	h := ws.NewHandler(srv, nil)
	defer h.Close()
	mux := http.NewServeMux()
	mux.Handle("/rpc", h)
	mux.Handle("/rpc/", h)
	web := httptest.NewServer(mux)
	defer web.Close()

	ctx := context.Background()
	ch, err := ws.Dial(ctx, "ws"+strings.TrimPrefix(web.URL, "http")+"/rpc", nil)
	if err != nil {
		log.Fatal(err)
	}
	c := rpcjson.NewClient(ch, nil)
	defer c.Close()
	var about struct {
		Name string `json:"name"`
	}
	if err := c.Call(ctx, "RPC.Describe", map[string]string{"name": "OTA.Commit"}, &about); err != nil {
		log.Fatal(err)
	}
	fmt.Println(about.Name)
	// Output: OTA.Commit
}

// A device that its network hides calls a server and serves it.
func ExampleConnect() {
	connect := func(ctx context.Context, srv *rpcjson.Server) error {
		return ws.Connect(ctx, srv, "wss://fleet.example/devices/"+srv.ID(), &ws.ConnectOptions{
			Dial: ws.DialOptions{Token: "from a safe place"},
		})
	}
	_ = connect
}
