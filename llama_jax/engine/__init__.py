"""Scheduler, pages, requests and the step loop, and the process that they run in."""
