"""Spiking networks and what is done to them: conversion, pruning, counting spikes, acting event by event."""
