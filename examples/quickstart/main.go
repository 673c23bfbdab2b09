// Quickstart shows what the library is about, on a simulated device: an update
// that is committed, one that nobody commits and that is undone, one during
// which the power fails, and a snapshot. Everything goes through the RPC that a
// real device serves and the mos tool calls. It needs nothing but loopback.
//
//	go run ./examples/quickstart                        # tell the story
//	go run ./examples/quickstart -listen 127.0.0.1:8080 # serve, to be tried by hand
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"time"

	"github.com/slotota/ota"
)

func main() {
	listen := flag.String("listen", "", "skip the story; serve the device at this `address`, such as 127.0.0.1:8080, until Ctrl-C")
	flag.Parse()
	if flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	info, err := os.Stdout.Stat()
	terminal := err == nil && info.Mode()&os.ModeCharDevice != 0
	err = run(ctx, &screen{w: os.Stdout, terminal: terminal}, *listen)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "quickstart:", err)
		os.Exit(1)
	}
}

// run makes the firmware files and the device, and tells the story or, with an
// address, serves the device there.
func run(ctx context.Context, out *screen, listen string) error {
	dir, err := os.MkdirTemp("", "quickstart")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	key, err := makeBundles(ctx, dir, "1.1", "1.2", "1.3")
	if err != nil {
		return err
	}
	files, url, err := serveFiles(dir)
	if err != nil {
		return err
	}
	defer files.Close()

	d, err := newDevice(key, out)
	if err != nil {
		return err
	}
	defer d.halt()
	if listen != "" {
		d.listen = listen
		return serve(ctx, d, out, filepath.Join(dir, "fw-1.1.zip"), url+"/fw-1.1.zip")
	}
	return story(ctx, d, out, url)
}

// story takes the device through its life. The device boots when we say so: its
// reset line ends in our hands.
func story(ctx context.Context, d *device, out *screen, url string) error {
	update := func(version string, commitTimeout int) error {
		_, err := d.call(ctx, "OTA.Update", fmt.Sprintf(`{"url": "%s/fw-%s.zip", "commit_timeout": %d}`, url, version, commitTimeout))
		return err
	}
	reset := func() error {
		if err := d.awaitReset(ctx); err != nil {
			return err
		}
		return d.boot(ctx)
	}
	committed := func(slot ota.SlotID) ota.BootState {
		return ota.BootState{Active: slot, Committed: true, Revert: ota.NoSlot}
	}

	for _, step := range []struct {
		title string
		do    func() error
		want  ota.BootState // what OTA.GetBootState must answer then
	}{{
		"The device boots the firmware that it came with",
		func() error { return d.boot(ctx) },
		committed(0),
	}, {
		"Update to 1.1: it goes into the slot that is not running",
		func() error { return update("1.1", 60) },
		ota.BootState{Active: 1, Revert: 0, CommitTimeout: time.Minute},
	}, {
		"The device reboots: 1.1 runs on trial",
		reset,
		ota.BootState{Active: 1, Revert: 0, CommitTimeout: time.Minute},
	}, {
		"1.1 works, so we commit it",
		func() error { _, err := d.call(ctx, "OTA.Commit", "{}"); return err },
		committed(1),
	}, {
		"Update to 1.2, to be committed within one second",
		func() error { return update("1.2", 1) },
		ota.BootState{Active: 0, Revert: 1, CommitTimeout: time.Second},
	}, {
		"The device reboots: 1.2 runs on trial",
		reset,
		ota.BootState{Active: 0, Revert: 1, CommitTimeout: time.Second},
	}, {
		"Nobody commits 1.2, so the device goes back to 1.1 by itself",
		reset,
		committed(1),
	}, {
		"Update to 1.3, but the power fails in the middle of it",
		func() error {
			d.cutPowerAt(0, appSize/2)
			// On a real device the connection would just break.
			if err := update("1.3", 60); err == nil {
				return errors.New("the power did not fail")
			}
			d.halt()
			return nil
		},
		ota.BootState{}, // nobody is there to be asked
	}, {
		"The power comes back: 1.1 still boots, only the other slot has lost its content",
		func() error { d.chip.PowerOn(); return d.boot(ctx) },
		committed(1),
	}, {
		"A snapshot: the other slot becomes a verified copy of 1.1",
		func() error {
			res, err := d.call(ctx, "OTA.CreateSnapshot", "{}")
			out.printf("  answer      %s\n", res)
			return err
		},
		committed(1),
	}} {
		out.printf("\n%s\n", step.title)
		if err := step.do(); err != nil {
			return fmt.Errorf("%s: %w", step.title, err)
		}
		if step.want.Equal(ota.BootState{}) {
			continue
		}
		res, err := d.call(ctx, "OTA.GetBootState", "{}")
		if err != nil {
			return err
		}
		out.printf("  boot state  %s\n", res)
		var got ota.BootState
		if err := json.Unmarshal([]byte(res), &got); err != nil || !got.Equal(step.want) {
			return fmt.Errorf("%s: this is not the boot state expected", step.title)
		}
	}
	out.printf("\nDone. With -listen 127.0.0.1:8080 you can try it yourself.\n")
	return nil
}

// serve keeps the device on until ctx ends.
func serve(ctx context.Context, d *device, out *screen, path, url string) error {
	if err := d.boot(ctx); err != nil {
		return err
	}
	out.printf(`
The device serves RPC. Everybody who can connect may call it, but it installs only
what is signed with the key of this run. Try, in another terminal:

  curl -d '{}' -H 'Content-Type: application/json' http://%[1]s/rpc/OTA.GetBootState
  curl -d '{"url":"%[2]s","commit_timeout":60}' -H 'Content-Type: application/json' http://%[1]s/rpc/OTA.Update
  curl -d '{}' -H 'Content-Type: application/json' http://%[1]s/rpc/OTA.Commit

or with the client of Mongoose OS:

  mos --port http://%[1]s/rpc call OTA.GetBootState
  mos --port http://%[1]s/rpc ota %[3]s
  mos --port http://%[1]s/rpc call OTA.Commit

Ctrl-C ends it and removes the firmware files.
`, d.addr, url, path)
	for {
		switch err := d.awaitReset(ctx); {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			return err
		}
		out.printf("\nReset\n")
		if err := d.boot(ctx); err != nil {
			return err
		}
		out.printf("  serving again\n")
	}
}

// serveFiles serves dir by HTTP on loopback.
func serveFiles(dir string) (io.Closer, string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, "", err
	}
	s := &http.Server{Handler: http.FileServer(http.Dir(dir)), ReadHeaderTimeout: 10 * time.Second}
	go s.Serve(l) // until Close
	return s, "http://" + l.Addr().String(), nil
}
