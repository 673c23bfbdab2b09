// Daemon is an update daemon for embedded Linux, to be copied and adapted: two
// slots in block devices or files, a boot record in three files, and RPC over
// HTTP for those who hold a token. Its counterpart at boot is
// examples/bootstage, which chooses the slot and tells the kernel.
//
//	daemon -slot0 /dev/mmcblk0p2 -slot1 /dev/mmcblk0p3 -state /var/lib/ota \
//		-platform myboard -key /etc/ota/key.pem -token /etc/ota/token \
//		-health http://127.0.0.1:8000/health \
//		-listen :8910 -tls-cert /etc/ota/tls.crt -tls-key /etc/ota/tls.key
//
// Bundles need a part "rootfs". A firmware on trial goes back by itself unless it
// is healthy and, if the update came with a commit timeout, OTA.Commit is called
// in time. For firmware in which not even the daemon starts, something must reset
// the device: a hardware watchdog, or StartLimitAction=reboot in the systemd unit.
package main

import (
	"context"
	"crypto/ecdsa"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/bootrecord"
	"github.com/slotota/ota/boot/health"
	"github.com/slotota/ota/bundle"
	"github.com/slotota/ota/fetch"
	"github.com/slotota/ota/flash/fileflash"
	"github.com/slotota/ota/rpcjson"
)

// version is that of the firmware this daemon is part of; set it by
// -ldflags "-X main.version=1.2.3".
var version = "development"

// config is what the daemon is told.
type config struct {
	slots           [2]string // paths
	state           string    // directory of the boot record
	running         int       // slot, or -1: as the kernel command line says
	platform        string
	key, token      string // paths
	health          string // URL, or ""
	tlsCert, tlsKey string // paths, or ""

	log    *slog.Logger
	reboot func(context.Context) error
}

func main() {
	c := config{log: slog.Default(), reboot: func(context.Context) error {
		// It returns soon; init then ends this process by SIGTERM.
		return exec.Command("reboot").Run()
	}}
	flag.StringVar(&c.slots[0], "slot0", "", "`path` of slot 0")
	flag.StringVar(&c.slots[1], "slot1", "", "`path` of slot 1")
	flag.StringVar(&c.state, "state", "", "`directory` of the boot record")
	flag.IntVar(&c.running, "running", -1, "slot that runs; -1 means ota.slot=N of the kernel command line")
	flag.StringVar(&c.platform, "platform", "", "hardware that firmware must be made for")
	flag.StringVar(&c.key, "key", "", "PEM `file` with the public key that firmware is signed with")
	flag.StringVar(&c.token, "token", "", "`file` with the token that clients send")
	flag.StringVar(&c.health, "health", "", "`URL` that answers 200 while the system works")
	flag.StringVar(&c.tlsCert, "tls-cert", "", "certificate `file`; without one, serve on loopback only")
	flag.StringVar(&c.tlsKey, "tls-key", "", "key `file` of the certificate")
	listen := flag.String("listen", "127.0.0.1:8910", "`address` to serve at")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	l, err := net.Listen("tcp", *listen)
	if err == nil {
		err = run(ctx, c, l)
	}
	if err != nil {
		c.log.Error("daemon", "err", err)
		os.Exit(1)
	}
}

// run serves on l until ctx ends.
func run(ctx context.Context, c config, l net.Listener) error {
	defer l.Close()
	if a, ok := l.Addr().(*net.TCPAddr); c.tlsCert == "" && ok && !a.IP.IsLoopback() {
		return fmt.Errorf("the token must not be sent over %v without TLS", a)
	}
	var slots []ota.Slot
	for _, path := range c.slots {
		// The running slot is mounted, or should be.
		f, err := fileflash.Open(path, &fileflash.Options{ReadOnlyIfMounted: true})
		if err != nil {
			return err
		}
		defer f.Close()
		slots = append(slots, ota.Slot{Parts: []ota.Part{{Name: "rootfs", Flash: f}}})
	}
	var copies []string
	for _, name := range []string{"boot.0", "boot.1", "boot.2"} {
		copies = append(copies, filepath.Join(c.state, name))
	}
	record, err := bootrecord.Files(copies, &bootrecord.Options{Running: func(context.Context) (ota.SlotID, error) {
		if c.running >= 0 {
			return ota.SlotID(c.running), nil
		}
		b, err := os.ReadFile("/proc/cmdline")
		if err != nil {
			return ota.NoSlot, err
		}
		return runningSlot(string(b))
	}})
	if err != nil {
		return err
	}
	pem, err := os.ReadFile(c.key)
	if err != nil {
		return err
	}
	key, err := bundle.ParseKey(pem)
	if err != nil {
		return fmt.Errorf("%s: %w", c.key, err)
	}
	token, err := os.ReadFile(c.token)
	if err != nil {
		return err
	}
	secret := strings.TrimSpace(string(token))
	if len(secret) < 16 {
		return fmt.Errorf("%s: a token needs 16 characters", c.token)
	}

	opts := &ota.Options{Platform: c.platform, Reset: c.reboot, Logger: c.log}
	opts.Health = func() []ota.Finding {
		return health.Check(ctx, &health.Options{Bootloader: record})
	}
	if c.health != "" {
		opts.Checks = []ota.Check{{Name: "health", Run: func(ctx context.Context) error { return healthy(ctx, c.health) }}}
	}
	dev, err := ota.Open(ctx, record, slots, opts)
	if err != nil {
		return err
	}
	access, err := rpcjson.NewAccess(rpcjson.AccessOptions{
		Tokens: []rpcjson.Token{{User: "operator", Hash: rpcjson.HashToken(secret)}},
	})
	if err != nil {
		return err
	}
	policy := &bundle.Policy{Keys: []*ecdsa.PublicKey{key}}
	host, _ := os.Hostname()
	srv, err := rpcjson.New(dev, rpcjson.Options{
		ID:   "ota-" + host,
		Info: rpcjson.Info{App: "daemon", Version: version, Platform: c.platform},
		Open: policy.Image,
		OpenRanges: func(ctx context.Context, f *fetch.File) (ota.Image, error) {
			img, err := policy.OpenRanges(ctx, f)
			if err != nil {
				return nil, err // not a nil *bundle.Reader inside of an interface
			}
			return img, nil
		},
		Authorizer: access,
		AllowHosts: []string{host},
		Logger:     c.log,
	})
	if err != nil {
		return err
	}
	web := rpcjson.NewHTTPServer(srv)

	serving, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := dev.Watch(serving); err != nil && serving.Err() == nil {
			c.log.Error("trial", "err", err)
		}
	})
	wg.Go(func() {
		if c.tlsCert == "" {
			cancel(web.Serve(l))
		} else {
			cancel(web.ServeTLS(l, c.tlsCert, c.tlsKey))
		}
	})
	c.log.Info("serving", "address", l.Addr(), "running", dev.Running())
	<-serving.Done() // told to end, or the HTTP server failed
	srv.Close()      // ends calls, and an update under way: it changes nothing then
	grace, done := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer done()
	if web.Shutdown(grace) != nil {
		web.Close()
	}
	wg.Wait()
	if ctx.Err() != nil {
		return nil
	}
	return context.Cause(serving)
}

// runningSlot finds ota.slot=N on a kernel command line.
func runningSlot(cmdline string) (ota.SlotID, error) {
	for _, arg := range strings.Fields(cmdline) {
		if v, ok := strings.CutPrefix(arg, "ota.slot="); ok {
			n, err := strconv.ParseUint(v, 10, 8)
			return ota.SlotID(n), err
		}
	}
	return ota.NoSlot, errors.New("no ota.slot=N on the kernel command line")
}

// healthy asks url until it answers 200. A trial may begin before the services
// are up; ctx ends after a minute, and that reverts.
func healthy(ctx context.Context, url string) error {
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		res, err := http.DefaultClient.Do(req)
		if err == nil {
			res.Body.Close()
			if res.StatusCode == http.StatusOK {
				return nil
			}
			err = errors.New(res.Status)
		}
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return err
		}
	}
}
