package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/bootrecord"
	"github.com/slotota/ota/bundle"
	"github.com/slotota/ota/fetch"
	"github.com/slotota/ota/flash/fileflash"
	"github.com/slotota/ota/rpcjson"
)

// simulation is a device whose flash is files: the slots, and three copies of the
// boot record.
type simulation struct {
	dir, platform, product, unhealthy, tokenFile, passwords string
	listen, parts                                           list
	slotCount                                               int
	pf                                                      policyFlags
	verbose                                                 bool

	e      *env
	places []*url.URL // from listen
	policy *bundle.Policy
	auth   rpcjson.Authorizer // nil if everybody may do everything
	slots  []ota.Slot
	files  []*fileflash.File
	log    *slog.Logger
}

func simulate(fs *flag.FlagSet) func(context.Context, *env, []string) error {
	var s simulation
	fs.StringVar(&s.dir, "dir", "", "`directory` with the device's flash; it is made if there is none")
	fs.Var(&s.listen, "listen", "`URL` to serve RPC at, may be repeated: [http://]HOST:PORT, tcp://HOST:PORT, udp://HOST:PORT, serial:///dev/PORT, mqtt://[USER:PASSWORD@]BROKER[:PORT], unix:///PATH (HTTP), rpc+unix:///PATH; else 127.0.0.1:8080")
	fs.StringVar(&s.platform, "platform", "sim", "`hardware` that bundles must be for")
	fs.StringVar(&s.product, "product", "", "`name` that bundles must have, if not empty")
	fs.Var(&s.parts, "part", "a part of each slot: `NAME=SIZE`; else app=8M and fs=2M. Their sizes must stay as they are")
	fs.IntVar(&s.slotCount, "slots", 2, "how many slots there are: `N`")
	fs.StringVar(&s.unhealthy, "unhealthy", "", "`version` whose health check fails, so that it is rolled back")
	fs.StringVar(&s.tokenFile, "token-file", "", "`file` with the bearer token that clients must send; it or -passwords is needed off loopback")
	fs.StringVar(&s.passwords, "passwords", "", "`file` with the users that clients must log in as, made by htdigest, realm RPC")
	fs.BoolVar(&s.verbose, "v", false, "log what the library logs")
	s.pf.define(fs)
	return func(ctx context.Context, e *env, args []string) error {
		if err := want(args, 0, 0); err != nil {
			return err
		}
		s.e = e
		defer func() {
			for _, f := range s.files {
				f.Close()
			}
		}()
		if err := s.prepare(); err != nil {
			return err
		}
		for {
			switch err := s.boot(ctx); {
			case ctx.Err() != nil:
				return nil // switched off
			case err != nil:
				return err
			}
		}
	}
}

// prepare opens the files.
func (s *simulation) prepare() (err error) {
	if s.dir == "" {
		return usagef("need -dir DIRECTORY")
	}
	if s.slotCount < 2 || s.slotCount > ota.MaxSlots { // before any file is made
		return usagef("-slots: need 2 to %d", ota.MaxSlots)
	}
	if s.policy, err = s.pf.policy(); err != nil {
		return err
	}
	s.log = slog.New(slog.DiscardHandler)
	if s.verbose {
		s.log = slog.New(slog.NewTextHandler(s.e.stderr, nil))
	}
	if s.tokenFile != "" || s.passwords != "" {
		if s.auth, err = s.access(); err != nil {
			return err
		}
	}
	if len(s.listen) == 0 {
		s.listen = list{"127.0.0.1:8080"}
	}
	for _, target := range s.listen {
		u, err := listenURL(target)
		if err != nil {
			return err
		}
		if s.auth == nil && exposed(u) {
			return fail(exitUsage, "127.0.0.1 needs none", "-listen %s: everybody can reach that, so it needs a -token-file or -passwords", ota.Quote(u.Redacted()))
		}
		s.places = append(s.places, u)
	}
	if len(s.parts) == 0 {
		s.parts = list{"app=8M", "fs=2M"}
	}
	if err := os.MkdirAll(s.dir, 0o777); err != nil {
		return err
	}
	for i := range s.slotCount {
		var slot ota.Slot
		for _, p := range s.parts {
			name, size, _ := strings.Cut(p, "=")
			n, err := parseSize(size)
			if err != nil || name == "" || name != filepath.Base(name) {
				return usagef("-part %s: need NAME=SIZE", ota.Quote(p))
			}
			f, err := fileflash.Open(filepath.Join(s.dir, fmt.Sprintf("slot%d.%s", i, name)), &fileflash.Options{Create: true, Size: n})
			if err != nil {
				return err
			}
			s.files = append(s.files, f)
			slot.Parts = append(slot.Parts, ota.Part{Name: name, Flash: f})
		}
		s.slots = append(s.slots, slot)
	}
	return nil
}

// boot boots the device, and runs it until it is reset or ctx ends.
func (s *simulation) boot(ctx context.Context) error {
	started := time.Now()
	var running ota.SlotID
	var paths []string
	for i := range 3 {
		paths = append(paths, filepath.Join(s.dir, fmt.Sprintf("boot%d", i)))
	}
	record, err := bootrecord.Files(paths, &bootrecord.Options{
		Running: func(context.Context) (ota.SlotID, error) { return running, nil },
	})
	if err != nil {
		return err
	}
	h, err := ota.Boot(ctx, record, s.slots, nil)
	if err != nil {
		return err
	}
	running = h.Slot
	fw := h.State.Slot(running)
	version := fw.Version
	if version == "" {
		version = "factory"
	}
	kind := "committed"
	if !h.State.Committed {
		kind = "on trial"
	}
	s.e.notef("boot: slot %v, version %s, %s", running, plain(version), kind)

	reset := make(chan struct{}, 1)
	dev, err := ota.Open(ctx, record, s.slots, &ota.Options{
		Platform: s.platform,
		Product:  s.product,
		Logger:   s.log,
		Checks: []ota.Check{{Name: "health", Run: func(context.Context) error {
			if version == s.unhealthy {
				return fmt.Errorf("version %s is said to be unhealthy", ota.Quote(version))
			}
			return nil
		}}},
		BootClock: func() (time.Duration, error) { return time.Since(started), nil },
		// It returns before the device is gone: its caller is part of what ends.
		Reset: func(context.Context) error {
			select {
			case reset <- struct{}{}:
			default:
			}
			return nil
		},
		OnEvent: s.event,
	})
	if err != nil {
		return err
	}
	srv, err := rpcjson.New(dev, rpcjson.Options{
		ID:         "sim_" + filepath.Base(s.dir),
		Info:       rpcjson.Info{App: s.product, Version: version, BuildID: fw.BuildID, Platform: s.platform},
		Open:       s.policy.Image,
		OpenRanges: s.openRanges,
		NoAuth:     s.auth == nil,
		Authorizer: s.auth,
		// It is a simulation, so its servers are nearby.
		Fetch:  &fetch.Policy{AllowHTTP: true, AllowLoopback: true, AllowPrivate: true},
		Logger: s.log,
	})
	if err != nil {
		return err
	}
	var services []*service
	defer func() {
		for _, v := range services {
			v.close()
		}
	}()
	defer srv.Close()
	for i, u := range s.places {
		v, err := listen(ctx, u)
		if err != nil {
			return err
		}
		services = append(services, v)
		if s.places[i], err = url.Parse(v.url); err != nil { // the same after a reset
			return err
		}
		if u.User != nil { // for the broker
			s.e.printf("%s\n", u.Redacted())
			continue
		}
		s.e.printf("%s\n", v.url)
	}
	ctx, cancel := context.WithCancel(ctx)
	served := make(chan error, len(services))
	var wg sync.WaitGroup
	for _, v := range services {
		wg.Go(func() { served <- v.serve(ctx, srv) })
	}
	wg.Go(func() {
		if err := dev.Watch(ctx); err != nil && ctx.Err() == nil {
			s.e.notef("trial: %v", err)
		}
	})
	select {
	case <-reset:
		s.e.notef("reset")
	case err = <-served:
	case <-ctx.Done():
	}
	cancel()
	srv.Close()
	wg.Wait()
	return err
}

// openRanges opens a bundle on a server, of which the device may leave out what it
// has already.
func (s *simulation) openRanges(ctx context.Context, f *fetch.File) (ota.Image, error) {
	img, err := s.policy.OpenRanges(ctx, f)
	if err != nil {
		return nil, err // not a nil *bundle.Reader inside of an interface
	}
	return img, nil
}

// event tells about what the device does.
func (s *simulation) event(e ota.Event) {
	switch {
	case e.Phase == ota.PhaseFailed:
		s.e.notef("%s failed: %v", e.Op, e.Err)
	case e.Phase == ota.PhaseDone:
		s.e.notef("%s done", e.Op)
		if e.Op == "update" || e.Op == "snapshot" {
			s.e.notef("bytes: %s", countsText(e.Counts))
		}
	}
}

// access lets users do everything.
func (s *simulation) access() (*rpcjson.Access, error) {
	o := rpcjson.AccessOptions{AllowPlainTokens: true}
	if s.tokenFile != "" {
		token, err := secret(s.tokenFile)
		if err != nil {
			return nil, err
		}
		if len(token) < 16 {
			return nil, usagef("%s: a token needs 16 characters", s.tokenFile)
		}
		o.Tokens = []rpcjson.Token{{User: "token", Hash: rpcjson.HashToken(token)}}
	}
	if s.passwords != "" {
		f, err := os.Open(s.passwords)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		if o.Passwords, err = rpcjson.ParsePasswords(f, "RPC"); err != nil {
			return nil, usagef("%s: %w", s.passwords, err)
		}
	}
	return rpcjson.NewAccess(o)
}
